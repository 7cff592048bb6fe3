# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that watches xenstore, and can do nothing else there."""
