"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Something asked for that cannot be done; the text is one line: the value seen, the value wanted, the mend.

    on_every_rank: all ranks raise it together, so that one of them is enough to print it.
    """

    def __init__(self, text: str, *, on_every_rank: bool = False):
        super().__init__(text)
        self.on_every_rank = on_every_rank
