"""Adapters: PEFT's injected matrices as site groups, and draws placed on them."""

from pyrolora.adapters.checkpoint import export_adapter, fingerprint, load_adapter
from pyrolora.adapters.placement import Placement
from pyrolora.adapters.sites import AdapterError, SiteGroup, find_sites

__all__ = ["AdapterError", "Placement", "SiteGroup", "export_adapter", "find_sites", "fingerprint", "load_adapter"]
