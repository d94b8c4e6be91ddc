"""A static LoRA fitted to a MixLoRA adapter: what can be merged, and served anywhere."""
