# SPDX-License-Identifier: GPL-2.0-or-later
"""The process without privilege that holds the state of one VM and its command socket."""
