# SPDX-License-Identifier: GPL-2.0-or-later
"""The hotplug process: one device of one domain in xenstore, given or taken away."""
