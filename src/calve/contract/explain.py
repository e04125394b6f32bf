"""What to make of a failure code: what happened, what the agent did about it, and what a person can do.

`Code.text` says it in one line; this is the page. For people only: the agent carries none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from calve.contract.codes import Code

__all__ = ["AFTER", "EXPLANATIONS", "Explanation", "explain", "known"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Prose, a few sentences each, without line breaks.

    Attributes:
        happened: what the machine met.
        agent: what the agent did before it gave up.
        remedy: where to look, and what to change.
    """

    happened: str
    agent: str
    remedy: str


AFTER: Final = (
    "Whatever the code, its line stands at the end of the console. Then the report is written, where user data asks for "
    "one; the machine waits (60 s, or calve.hold=SECONDS on the kernel command line), so that the console can be read, "
    "lets its launch hook go, and powers off. A machine that has served before goes on with its last good system where "
    "the failure may pass."
)
"""What comes after every failure."""

_AT_ONCE: Final = "It did not try again: a second try by the same machine gives the same answer."
_PAUSES: Final = "with pauses that grow, and jitter"

_METADATA = {
    Code.IMDS_UNREACHABLE: Explanation(
        "No answer came from the metadata service: no network card, no lease by DHCP, or nothing but timeouts and "
        "errors of the server at 169.254.169.254.",
        "It waited for the network card and the lease (30 s each), and asked the metadata service for 60 s, "
        f"{_PAUSES}.",
        "Look at the instance's metadata options (HttpEndpoint must be enabled) and at its subnet. If the phase is "
        "`network`, look for the card's driver in the image (ena, virtio_net) and for DHCP in the VPC. If it struck "
        "one machine of many, let the group replace it.",
    ),
    Code.IMDS_DENIED: Explanation(
        "The metadata service answered 403, or refused a token: it is disabled for this instance.",
        _AT_ONCE,
        "Set HttpEndpoint to enabled in the launch template's metadata options. HttpTokens may be required: the agent "
        "only speaks IMDSv2.",
    ),
    Code.USERDATA_ABSENT: Explanation(
        "The instance was launched without user data, so nobody told it what to become.",
        _AT_ONCE,
        "Launch it by a launch template version that Calve wrote; look at which version the group uses.",
    ),
    Code.USERDATA_FOREIGN: Explanation(
        'There is user data, but it is not a JSON object with the member "calve": a shell script or cloud-config, '
        "perhaps, or an image of Calve's under somebody else's template.",
        "It ran nothing of it. " + _AT_ONCE,
        "Use a launch template version that Calve wrote, or another image under this template.",
    ),
    Code.USERDATA_MALFORMED: Explanation(
        "The user data is Calve's, but a member is missing, of the wrong kind or out of range; the message names it.",
        _AT_ONCE,
        "Write the launch template version anew. If it was edited by hand, compare it with the reference of user data.",
    ),
    Code.USERDATA_VERSION: Explanation(
        "The user data is of a version that the image's agent does not know: the image is older than what wrote it.",
        _AT_ONCE,
        "Use a newer image in the launch template, or write the user data with the Calve that made the image.",
    ),
    Code.KEY_UNKNOWN: Explanation(
        "The user data chooses a signing key that neither the image nor a cache's keyring trusts, or every key that it "
        "chooses was revoked. User data can only choose among keys that are trusted.",
        _AT_ONCE + " Nothing was fetched but the keyring.",
        "Compare the names in the message with `calve keys list`. Add the key to the keyring (`calve keys add`), use "
        "an image that trusts it, or release again with a key that counts.",
    ),
}

_CACHE = {
    Code.CACHE_UNREACHABLE: Explanation(
        "The binary cache did not answer: no route, no name, connections that broke, or nothing but 5xx and SlowDown.",
        f"It tried each request again, {_PAUSES}, went on where a transfer had broken off, and asked the other caches "
        "where there were some, for up to two minutes.",
        "Look at the subnet's route to S3 (a gateway endpoint, or NAT), at the security group, and at the region and "
        "endpoint in the cache's URL. If only some machines are struck, look at AWS's health page, and try again.",
    ),
    Code.CACHE_DENIED: Explanation(
        "The cache answered 403. Without the permission to list the bucket, S3 says 403 of an object that is missing, "
        "too.",
        "It renewed the role's credentials where they had expired, corrected a clock that was off, and waited up to "
        "30 s (at most a third of its deadline) for a role that is new; what remained was a denial.",
        "Look at the role of the instance profile: it needs s3:GetObject on the bucket's objects, and s3:ListBucket "
        "on the bucket to have missing objects called missing. Look at the bucket's policy, and at the KMS key where "
        "the bucket has one. If all of that is right, push the closure again: an object may be missing.",
    ),
    Code.CACHE_MISSING: Explanation(
        "There is no such bucket in that region.",
        _AT_ONCE,
        "Compare the cache's URL in the user data (bucket, region, endpoint) with the fleet file; `calve cache init` "
        "makes the bucket.",
    ),
    Code.CACHE_UNUSABLE: Explanation(
        "The cache, or an object in it, is of a kind that this image cannot read: another store directory, a "
        "compression it does not know, a manifest of a later version.",
        _AT_ONCE,
        "Look at the cache's URL first. If that is right, use an image of the Calve that pushed.",
    ),
    Code.CACHE_UNTRUSTED: Explanation(
        "The cache's TLS certificate is refused, or its keyring is damaged, older than one that was seen before, or "
        "not signed by a root key of the image.",
        _AT_ONCE + " Nothing of the closure was fetched.",
        "For a certificate: the authorities in the image (`calve image initrd --ca`), and the machine's clock. For a "
        "keyring: `calve keys list` verifies it. If it was put back to an older state without you, treat it as an "
        "attack.",
    ),
    Code.MANIFEST_DAMAGED: Explanation(
        "The manifest that user data names by its digest is not what the cache has under that name.",
        "It asked every cache, and used none of what did not match.",
        "Run `calve cache verify`, then `calve cache repair`. If nobody here changed it, find out who can write to the "
        "bucket.",
    ),
    Code.CLOSURE_INCOMPLETE: Explanation(
        "A path of the closure, its narinfo or its archive is not in any of the caches: the push did not end, or "
        "something was deleted since.",
        "It asked every cache that the user data names. What had come already stays for the next attempt, and is not "
        "valid yet.",
        "Push the closure again, with `--check` where objects may be gone. Then see what keeps the release from "
        "garbage collection: `calve cache ls`.",
    ),
    Code.SIGNATURE: Explanation(
        "A path has no signature by a key that is trusted and chosen. The agent never boots such a path.",
        _AT_ONCE + " The archive was not unpacked.",
        "If it was pushed with another key: `calve cache sign`, or add that key to the keyring and release with it. "
        "If nobody pushed it, somebody else can write to the bucket.",
    ),
    Code.NAR_DAMAGED: Explanation(
        "A path's archive is cut off, altered, or not of the size and hash that its signed narinfo promises.",
        "It threw the path away, fetched it again, and asked the other caches where there were some.",
        "Run `calve cache verify`, then `calve cache repair`. If the cache is sound, look at what stands between it and "
        "the machine.",
    ),
}

_MACHINE = {
    Code.DISK_SMALL: Explanation(
        "The closure does not fit on the root file system: bytes or inodes do not suffice. Mostly this is found before "
        "the first byte is fetched.",
        _AT_ONCE,
        "Give the launch template's root volume more space; the message says how much is needed. Or make the closure "
        "smaller.",
    ),
    Code.MEMORY_SMALL: Explanation(
        "The memory that is left does not suffice for the agent, or it ran out of it.",
        _AT_ONCE,
        "Use an instance type with at least 512 MB. If it has that, look at what else the initrd holds in memory.",
    ),
    Code.SYSTEM_INVALID: Explanation(
        "The closure came whole and verified, but its top is no system: it has no init.",
        "It left the profile as it was.",
        "The fleet file's `system` must be a NixOS toplevel (config.system.build.toplevel), not a package. Release "
        "again.",
    ),
    Code.HEALTH_MISSING: Explanation(
        "User data names a launch hook, which waits until stage 2 says that the system is healthy. The closure's "
        "boot.json names no unit that would: the hook would time out, minutes later and without a reason.",
        "It fetched and verified the closure, and left the profile as it was.",
        "Enable `services.calve` in the system's configuration. Or take the hook off the group, so that the balancer's "
        "health checks judge alone.",
    ),
    Code.CONTRACT_UNKNOWN: Explanation(
        "The closure's boot.json, which says what it expects of the initrd that starts it, is damaged or of a version "
        "that the image's agent does not know.",
        "It fetched and verified the closure, and left the profile as it was.",
        "Build the image with the Calve that the closure was built with. If they are the same, look at `boot.json` in "
        "the toplevel.",
    ),
    Code.KERNEL_FOREIGN: Explanation(
        "The closure was built for another kernel than the one that runs, and it does not say that its own initrd has "
        "the agent: neither kernel could start it.",
        "It left the profile as it was, and started no kernel: an initrd without the agent would find no system.",
        "Enable `boot.initrd.calve` in the system's configuration, so that its own kernel and initrd can be started. "
        "Or use an image with the closure's kernel.",
    ),
    Code.KEXEC_DENIED: Explanation(
        "The closure has another kernel than the image, and the kernel that runs refused to load it: lockdown, as under "
        "Secure Boot, wants a signature that it trusts, or kexec was turned off.",
        "It left the profile as it was. Where the kernel that runs would have done, it would have gone on with that.",
        "Use an image with the closure's kernel: then none has to be loaded. Or boot the image without Secure Boot, and "
        "without `lockdown=` and `kexec_load_disabled`.",
    ),
    Code.KEXEC_FAILED: Explanation(
        "The closure has another kernel than the image, and it could not be loaded or did not start; the message has "
        "the kernel's reason.",
        "Where it could not be loaded, it left the profile as it was.",
        "Look at the kernel's messages above the line. An image with the closure's kernel needs no kexec.",
    ),
    Code.KEXEC_LOOP: Explanation(
        "The agent had started another kernel in this boot already, and what runs now is not what the closure expects. "
        "It starts a second one never, as that might not end.",
        _AT_ONCE,
        "Compare the release in the message with `kernelRelease` in the closure's boot.json. If the user data was "
        "changed while the machine booted, nothing is wrong: the next boot starts from the image.",
    ),
    Code.DISK_FAULT: Explanation(
        "The root disk did not appear, could not be mounted, or gave errors while being read or written.",
        "It waited 30 s for the disk. It does not go on beside an error of the file system: half a closure must not "
        "look whole.",
        "Look at the kernel's messages above the line. If the disk did not appear, look at `root=` on the kernel "
        "command line and for its driver in the image (nvme, virtio_blk). Else replace the machine.",
    ),
    Code.DEADLINE: Explanation(
        "The closure was not there before the deadline that user data gives. Nothing else was wrong.",
        "It pulled until the deadline. What had come whole stays for the next attempt.",
        "Look at the rate in `calve timeline`: a small instance type's network, a cache in another region, or a "
        "closure that grew. Put more into the image beforehand, or give a longer deadline.",
    ),
    Code.UNHEALTHY: Explanation(
        "The system started, and something that must hold did not within its time: a path, a port, a unit or a command "
        "of the closure's /etc/calve/health.json or of user data's `health`. The message names it.",
        "Stage 2 tried everything once a second until its time was over, and put the journal's warnings on the console "
        "ahead of the line. A machine that had served before goes back to its last good system.",
        "Read the lines above. If the service only needs longer, raise `health.within` in the fleet file, or "
        "`services.calve.health.withinSeconds`.",
    ),
    Code.HOOK_DENIED: Explanation(
        "The system is healthy, and the group's launch hook could not be told so: the machine's role may not complete it.",
        _AT_ONCE,
        "Allow the role autoscaling:CompleteLifecycleAction and autoscaling:RecordLifecycleActionHeartbeat on the group.",
    ),
    Code.HOOK_UNREACHABLE: Explanation(
        "The system is healthy, and the Auto Scaling service, which holds it by a launch hook, gave no good answer.",
        f"It tried for 30 s, {_PAUSES}.",
        "Give the machine's subnet a route to the Auto Scaling endpoint (a VPC endpoint for `autoscaling` will do). Or "
        "take the hook off the group.",
    ),
    Code.INTERNAL: Explanation(
        "The agent met something that it has no code for: a fault of Calve's, or an image that was built wrong.",
        "It printed a traceback where it had one.",
        "Please report it, with the traceback that stands above the line in the console's log.",
    ),
}

EXPLANATIONS: Final = MappingProxyType(_METADATA | _CACHE | _MACHINE)
"""One for every code."""


_BY_VALUE: Final = {code.value: code for code in Code}


def known(code: str) -> Code | None:
    """Return a code by its value; None where this version does not know it."""
    return _BY_VALUE.get(code)


def explain(code: str) -> Explanation | None:
    """Return a code's page; None where this version does not know the code."""
    found = known(code)
    return None if found is None else EXPLANATIONS[found]
