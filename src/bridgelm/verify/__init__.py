"""Verdicts on completions: exact verifiers, a killable pool for those that may hang, and the user's own functions."""

from bridgelm.verify.base import Verifier, build_verifier

__all__ = ["Verifier", "build_verifier"]
