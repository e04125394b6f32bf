"""The simulated region as the show needs it: S3, metadata, EC2, EBS, Auto Scaling, a load balancer, real machines.

Also how each side reaches it: machines see S3 and the other services at link-local addresses that QEMU forwards, the
operator at ports of 127.0.0.1; they are the same services.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from calve.aws.session import Session
from calve.clock import SYSTEM
from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope
from calve.region.access import Access
from calve.region.balancer import HaProxy
from calve.region.blocks import Snapshots
from calve.region.cloud import Cloud
from calve.region.ebs import EbsService
from calve.region.imds import Imds, Instance
from calve.region.machine import Launch
from calve.region.message import Request, Response
from calve.region.names import ACCOUNT
from calve.region.objects import ObjectService
from calve.region.qemu import Forward, MachineImage, QemuMachines
from calve.region.server import Server
from calve.region.signature import Key, Principals, allowed
from calve.region.storage import Storage
from calve.transport.credentials import Credentials, Static

__all__ = ["BUCKET", "COMMAND_LINE", "REGION", "S3_DOMAIN", "World"]

REGION: Final = "eu-central-1"
BUCKET: Final = "calve-demo"
ROLE: Final = "calve-machine"
S3_DOMAIN: Final = f"s3.{REGION}.calve.test"
COMMAND_LINE: Final = (
    "console=ttyS0,115200n8 root=/dev/vda init=/nix/var/nix/profiles/system/init panic=30 quiet"
)

_S3_ADDRESS: Final = "169.254.169.250"
_API_ADDRESS: Final = "169.254.169.249"
_CREDENTIALS_LAST: Final = dt.timedelta(hours=6)


class World:
    """The region, running while the block lasts.

    Args:
        directory: objects, disks and consoles; of its own.
        group: the Auto Scaling group whose lifecycle actions machines may complete.

    Attributes:
        policy: of the machines' role, as `calve iam show machine` prints it.
    """

    def __init__(self, directory: Path, *, group: str = "web") -> None:
        self._owner = contextlib.ExitStack()
        self.principals = Principals()
        self._operator = self.principals.add_user("operator")
        scope = Scope(account=ACCOUNT, region=REGION, bucket=BUCKET, group=group)
        self.policy = allowed(policy(Role.MACHINE, scope).document)
        self.principals.set_policy(ROLE, self.policy)
        self.objects = ObjectService(
            directory / "s3", self.principals, region=REGION, domains=(S3_DOMAIN,)
        )
        self.objects.add_bucket(BUCKET)
        self.s3 = Server(self.objects.handle, name="s3")
        snapshots = Snapshots(directory / "ebs", region=REGION)
        self.ebs = EbsService(snapshots, self.principals)
        self.storage = Storage(REGION, snapshots, objects=self.objects)
        self.machines = QemuMachines(
            directory / "machines", self._metadata, volumes=self.storage.volume
        )
        # A target group is checked every 5 s at the least on AWS, which is long for a show.
        self.balancer = HaProxy(check_interval_s=1.0, directory=directory)
        access = Access(self.principals, region=REGION)
        self.cloud = Cloud(
            self.machines,
            self.balancer,
            region=REGION,
            authenticate=access.check,
            storage=self.storage,
        )
        self.api = Server(self._answer, name="aws")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.s3)
            undo.callback(self.machines.close)
            undo.enter_context(self.balancer)
            undo.enter_context(self.storage)
            undo.enter_context(self.cloud)
            undo.enter_context(self.api)
            self.machines.forwards = (
                Forward(_S3_ADDRESS, 80, self.s3.port),
                Forward(_API_ADDRESS, 80, self.api.port),
            )
            self._owner = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.close()

    def _answer(self, request: Request) -> Response:
        """Answer for all services but S3: EBS direct has paths, the others have actions."""
        if request.path.startswith("/snapshots"):
            return self.ebs.handle(request)
        return self.cloud.handle(request)

    def add_image(self, image_id: str, name: str, image: MachineImage) -> None:
        """Let instances be launched from an image."""
        self.machines.images[image_id] = image
        self.cloud.add_image(image_id, name)

    @property
    def session(self) -> Session:
        """Return the operator's session: boto3, with this region as its endpoint."""
        return Session(
            region=REGION, endpoint=self.api.url, credentials=self.operator_credentials.value
        )

    @property
    def operator_cache(self) -> str:
        """Return the cache's URL for the operator."""
        return self._cache(self.s3.url)

    @property
    def machine_cache(self) -> str:
        """Return the cache's URL for machines."""
        return self._cache(f"http://{_S3_ADDRESS}")

    @property
    def machine_api(self) -> str:
        """Return the URL of EC2, Auto Scaling and Elastic Load Balancing for machines."""
        return f"http://{_API_ADDRESS}"

    @property
    def machine_reports(self) -> str:
        """Return where machines write their reports, without what tells one from another."""
        return f"boot-reports/{self.principals.role_id(ROLE)}"

    @staticmethod
    def _cache(endpoint: str) -> str:
        return f"s3://{BUCKET}?region={REGION}&endpoint={quote(endpoint, safe='')}"

    @property
    def operator_credentials(self) -> Static:
        """Return the operator's credentials."""
        return Static(Credentials(self._operator.access_key, self._operator.secret_key))

    def _metadata(self, launch: Launch) -> Server:
        """Make the metadata service of one instance."""
        keys: list[Key] = []

        def credentials() -> Key:
            now = SYSTEM.now()
            if not keys or (keys[-1].expires or now) - now < _CREDENTIALS_LAST / 2:
                expires = now + _CREDENTIALS_LAST
                keys.append(self.principals.add_session(ROLE, launch.instance_id, expires))
            return keys[-1]

        instance = Instance(
            instance_id=launch.instance_id,
            region=REGION,
            availability_zone=f"{REGION}a",
            local_ipv4="169.254.169.15",
            instance_type=launch.instance_type,
            image_id=launch.image_id,
            account_id=ACCOUNT,
            role=ROLE,
            user_data=lambda: launch.user_data or None,
            credentials=credentials,
            lifecycle_state=lambda: self.cloud.target_lifecycle(launch.instance_id),
        )
        return Server(Imds(instance).handle, name=launch.instance_id)
