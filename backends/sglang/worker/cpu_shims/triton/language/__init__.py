"""Types and annotations of kernels that are defined and never run."""

from torchspec_absent import AbsentClass, stand_in  # type: ignore[import-not-found]


class constexpr(AbsentClass):  # type: ignore[misc]  # noqa: N801
    def __init__(self, value: object = None) -> None:
        self.value = value


class dtype(AbsentClass):  # type: ignore[misc]  # noqa: N801
    pass


stand_in(__name__)
