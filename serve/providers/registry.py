"""The providers by name, and the precisions of their arithmetic."""

from serve.providers.base import Provider
from serve.providers.cpu import Cpu
from serve.providers.cuda import Cuda
from serve.providers.openvino import OpenVino
from serve.providers.tensorrt import TensorRT

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for provider in (Cpu(), Cuda(), TensorRT(), OpenVino())
}
PRECISIONS = {name: provider.precisions for name, provider in PROVIDERS.items()}
ALL_PRECISIONS = tuple(dict.fromkeys(p for precisions in PRECISIONS.values() for p in precisions))


def why_absent(provider: str) -> str:
    """Return why a provider cannot be used, as far as is known without loading it; "" when it may be."""
    return PROVIDERS[provider].why_absent()
