"""The one exception that speaks to a user instead of a developer."""


class UserError(Exception):
    """A mistake that the user can mend.

    Entry points print its text as one line and exit with code 2, without a stack trace. The text names what is wrong,
    where (file, row group, column or setting) and how to mend it.
    """
