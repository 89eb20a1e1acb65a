"""Every error a user can meet: which object, what was expected, what was found, and what to do."""


class CompressError(ValueError):
    """Base of all errors raised by zoo_compress."""


class AnalysisError(CompressError):
    """A model could not be traced, or is not a model."""


class VerificationError(CompressError):
    """A proof failed: the layout does not describe the model."""


class WidthError(CompressError):
    """A choice of widths that the layout does not admit, or a budget no choice reaches."""


class BudgetError(WidthError):
    """A budget that no choice of widths reaches, however they are ranked."""


class VariantError(CompressError):
    """A stored variant (config.json, model.safetensors) that cannot be trusted or does not fit its base."""


class RecipeError(CompressError):
    """A recipe that cannot run as written."""


class HubError(CompressError):
    """The Hugging Face Hub, or the way to it, did not do what was asked."""
