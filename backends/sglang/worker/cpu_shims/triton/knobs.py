"""SGLang watches when kernels are loaded, where triton can tell."""

runtime = compilation = None
