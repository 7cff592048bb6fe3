# SPDX-License-Identifier: GPL-2.0-or-later
"""What asks a device model to stand still, to say its state, and to go on."""
