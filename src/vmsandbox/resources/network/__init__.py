"""A pod's network: what an engine left in a network namespace, and how the guest gets it.

Every Ethernet-like interface of the namespace gets a tap beside it, and traffic-control filters carry frames between
the two (the tcfilter model): whatever arrives at the interface goes to the tap, and so to the guest, and whatever the
guest sends leaves by the interface.  The namespace's own network stack sees neither.

`model` describes interfaces; `attach` is what the supervisor calls; `helper` is the short-lived process that enters
the namespace, because no thread of the supervisor may; `rtnl` talks to the kernel; `guard` says which frames of a
guest pass; `namespaces` checks, makes and removes namespaces.
"""
