"""Target engines that run in processes of their own, seen from the trainer: environments, launch, calls, retries."""
