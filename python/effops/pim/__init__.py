"""Processing in memory: what a model's numbers become on such a device, and its time and energy there."""

from effops.pim.cache import BankedKVCache
from effops.pim.device import Device, DeviceError
from effops.pim.layout import BankLayout
from effops.pim.model import ModelShape
from effops.pim.offload import PimExperts, PimLinear, offload
from effops.pim.simulate import Result, System, simulate
from effops.pim.workload import Workload

__all__ = [
    "BankLayout",
    "BankedKVCache",
    "Device",
    "DeviceError",
    "ModelShape",
    "PimExperts",
    "PimLinear",
    "Result",
    "System",
    "Workload",
    "offload",
    "simulate",
]
