"""MixLoRA as a PEFT method: `get_peft_model(model, MixLoraConfig(...))`."""

# Before any module of this package: importing peft registers the method, which imports these modules in turn. The other
# way round the registration would meet a half-imported `config`.
import peft  # noqa: F401
