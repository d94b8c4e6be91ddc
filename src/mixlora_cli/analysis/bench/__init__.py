"""`mixlora bench`: what MixLoRA costs next to plain LoRA, measured on this machine."""
