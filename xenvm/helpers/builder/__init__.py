# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that holds the hypervisor, for one request."""
