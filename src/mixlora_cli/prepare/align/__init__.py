"""Stage one of the small model: picture -> caption, before any adapter."""
