"""Processing in memory: what a model's numbers become on such a device, and its time and energy there."""

from effops.pim.device import Device, DeviceError
from effops.pim.model import ModelShape
from effops.pim.simulate import Result, System, simulate
from effops.pim.workload import Workload

__all__ = ["Device", "DeviceError", "ModelShape", "Result", "System", "Workload", "simulate"]
