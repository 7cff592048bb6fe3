# SPDX-License-Identifier: GPL-2.0-or-later
"""From the text of a config file to a checked Config, and back; pure, no input or output."""
