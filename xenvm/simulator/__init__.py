# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated host: domains, a xenstore, backends and guests in one process without privilege."""
