# SPDX-License-Identifier: GPL-2.0-or-later
"""xenvm: a single-VM monitor for Xen."""

__version__ = "0.1.0"
