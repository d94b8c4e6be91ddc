"""What a trained adapter does: interference, selections, a static LoRA of it, its cost."""
