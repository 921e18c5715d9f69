"""Stand-ins for packages that SGLang imports and never calls on a CPU. This folder itself goes on the path."""
