# SPDX-License-Identifier: GPL-2.0-or-later
"""Short-lived privileged processes, and the watcher."""
