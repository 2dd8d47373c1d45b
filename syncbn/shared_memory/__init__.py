"""Messages inside one host without a network: each rank leaves its row in memory that its peers read too.

agreement.py opens it, mailbox.c and mailbox.py are what goes on in it. Linux alone has what they need; elsewhere, and
where mailbox.c was not built, `agree` returns None.
"""

from syncbn.shared_memory.agreement import Agreement, agree
from syncbn.shared_memory.mailbox import CAPACITY, Mailbox, available

__all__ = ["CAPACITY", "Agreement", "Mailbox", "agree", "available"]
