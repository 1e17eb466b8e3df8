"""The one exception that users are meant to see: it ends the command with one line and exit code 2."""


class UserError(ValueError):
    """Wrong input. The message names the place (file, line or key) and the fix."""
