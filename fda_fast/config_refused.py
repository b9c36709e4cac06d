"""What mergekit's YAML may hold that is not for FDA: refused with the reason."""

REFUSED = {
    "slices": "slices assemble a model from layer ranges; FDA merges whole models: use 'models'",
    "modules": "modules describe multi-part models; FDA merges one model: use 'models'",
    "chat_template": "the chat template comes from the base model",
    "normalize": "FDA does not average task vectors, so there are no weights to normalise",
    "density": "FDA keeps task vectors whole (density belongs to TIES and DARE)",
    "epsilon": "FDA keeps task vectors whole (epsilon belongs to DELLA)",
    "gamma": "FDA keeps task vectors whole (gamma belongs to Model Breadcrumbs)",
    "rescale": "FDA does not drop parameters, so nothing is rescaled",
    "t": "t interpolates two models in SLERP",
}
"""mergekit's keys that have no meaning here, and why."""

REFUSED_METHODS = {
    "ties": "TIES trims task vectors and elects their signs",
    "dare_ties": "DARE drops parameters at random",
    "dare_linear": "DARE drops parameters at random",
    "della": "DELLA drops parameters at random",
    "della_linear": "DELLA drops parameters at random",
    "breadcrumbs": "Model Breadcrumbs masks parameters",
    "breadcrumbs_ties": "Model Breadcrumbs masks parameters",
    "linear": "a linear merge has no base model",
    "model_stock": "Model Stock interpolates by angles",
    "slerp": "SLERP interpolates two models",
    "nuslerp": "SLERP interpolates two models",
    "multislerp": "SLERP interpolates models",
    "karcher": "a Karcher mean has no task vectors",
    "passthrough": "passthrough merges nothing",
    "sce": "SCE selects parameters by variance",
}
"""mergekit's methods that are neither FDA nor one of its starting points."""
