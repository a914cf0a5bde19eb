"""What a seed means: which operation, who is killed, and when.  `tests.harness.killing` plays it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

#: of the rounds in which a container may share a directory, how many it does in
SHARED = 0.6


@dataclass(frozen=True)
class Operation:
    """What is done in a round: how long it takes at most, who can be killed, and whether something is prepared."""

    within: float
    victims: tuple[str, ...] = ("supervisor", "stand-in", "machine", "client")
    #: "": nothing, else a "container" that runs or is "stopped", a "pod" with one, or a "spare" machine
    prepared: str = ""
    #: whether there is a parent that pods are forked from: "" if not, else its "private" kind, which is shareable where
    #: the container shares a directory, the "explicit" one, or one that is still "coming"
    parent: str = ""
    #: whether the container may share a directory with the host
    may_share: bool = False


#: who can be killed where a container runs already, in which the end of the agent can be brought about at any moment
INSIDE = ("supervisor", "stand-in", "machine", "client", "agent")
#: who can be killed where a pod is forked
FORKING = ("supervisor", "machine", "client", "keeper", "parent")
OPERATIONS = {
    "run": Operation(3.0, ("nursery", "supervisor", "stand-in", "machine", "client"), may_share=True),
    "create": Operation(2.0, may_share=True),
    "exec": Operation(2.0, INSIDE, prepared="container", may_share=True),
    "stop": Operation(1.0, INSIDE, prepared="container", may_share=True),
    "rm": Operation(1.0, INSIDE, prepared="container", may_share=True),
    "start": Operation(2.0, prepared="stopped", may_share=True),
    "restart": Operation(3.0, INSIDE, prepared="container", may_share=True),
    "run with a network": Operation(4.0),
    "run in a namespace": Operation(4.0),
    "pod create": Operation(2.0, ("supervisor", "machine", "client")),
    "run in a pod": Operation(2.0, INSIDE, prepared="pod", may_share=True),
    "create in a pod": Operation(1.0, INSIDE, prepared="pod", may_share=True),
    "start in a pod": Operation(1.0, INSIDE, prepared="pod", may_share=True),
    "pod stop": Operation(1.0, INSIDE, prepared="pod"),
    "pod rm": Operation(1.0, INSIDE, prepared="pod"),
    "template build": Operation(6.0, ("machine", "client")),
    "run without its template": Operation(3.0, ("supervisor", "machine", "template")),
    "run in what is ready": Operation(3.0, ("nursery", "supervisor", "machine", "client"), prepared="spare"),
    "run as a fork": Operation(1.5, (*FORKING, "nursery", "stand-in", "template"), parent="private", may_share=True),
    "create as a fork": Operation(1.0, FORKING, parent="private", may_share=True),
    "restart as a fork": Operation(
        1.5, (*INSIDE, "keeper", "parent"), prepared="container", parent="private", may_share=True
    ),
    "pod create as a fork": Operation(1.0, FORKING, parent="explicit"),
    "run while a parent is made": Operation(6.0, (*FORKING, "nursery", "maker"), parent="coming", may_share=True),
}


@dataclass(frozen=True)
class Round:
    """What one seed means."""

    seed: int
    operation: str
    shared: bool
    victims: tuple[str, ...]
    delay: float

    @classmethod
    def of(cls, seed: int) -> Round:
        random = Random(seed)
        operation = list(OPERATIONS)[seed % len(OPERATIONS)]
        about = OPERATIONS[operation]
        shared = about.may_share and random.random() < SHARED
        possible = (*about.victims, "virtiofsd") if shared else about.victims
        victims = tuple(random.sample(possible, random.choice((1, 1, 1, 2))))
        return cls(seed, operation, shared, victims, random.uniform(0, about.within))
