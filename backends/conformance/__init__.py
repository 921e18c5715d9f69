"""What a target engine must do, as checks that any engine can be put through (`torchspec.backends.api`, version 1).

    torchspec doctor --conformance-backend ENGINE
    pytest --pyargs torchspec.backends.conformance --backend ENGINE

Features, text and decoding steps are compared with what transformers computes of the same target on the host, in fp32.
"""

from torchspec.backends.conformance.subject import Setting, Subject
from torchspec.backends.conformance.suite import CHECKS, TOPICS

__all__ = ["CHECKS", "TOPICS", "Setting", "Subject"]
