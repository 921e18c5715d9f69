"""What a device adapter must do, as checks that any adapter can be put through (`torchspec.devices.api`, version 1).

    torchspec doctor --conformance DEVICE
    pytest --pyargs torchspec.devices.conformance --device DEVICE

Results are compared with definitions worked out in float64 on the host, gradients included. What needs several ranks
starts real processes, and the last checks train a small draft through the command line.
"""

from torchspec.devices.conformance.subject import Subject, subject_of
from torchspec.devices.conformance.suite import CHECKS, TOPICS

__all__ = ["CHECKS", "TOPICS", "Subject", "subject_of"]
