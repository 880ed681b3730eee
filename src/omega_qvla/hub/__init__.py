"""Quantized checkpoints on the Hugging Face Hub: a model card from what a checkpoint says about itself, push, pull.

What travels is what the manifest names, and the card. Nothing damaged is sent, and what arrives gets its name only
when it is verified.
"""

from omega_qvla.hub.card import Origin, model_card, write_card
from omega_qvla.hub.contents import HubError
from omega_qvla.hub.transfer import check_base, pull, push

__all__ = ["HubError", "Origin", "check_base", "model_card", "pull", "push", "write_card"]
