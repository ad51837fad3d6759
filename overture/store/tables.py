"""The index's tables. What belongs to a tenant hangs on its row, so that one row, locked, orders a tenant's writers."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

__all__ = ["SCHEMA", "facts", "garbage", "metadata", "prompts", "states", "tenants", "versions"]

SCHEMA = 1
"""Version of this layout. A change that an older program could misread raises it."""

metadata = MetaData()

# SQLite compares text by bytes; PostgreSQL must be told to, or the order would depend on the server's language.
_Text = String().with_variant(String(collation="C"), "postgresql")
_Id = BigInteger().with_variant(Integer, "sqlite")  # only an INTEGER key numbers itself in SQLite

facts = Table(
    "overture_store",
    metadata,
    Column("name", _Text, primary_key=True),
    Column("value", _Text, nullable=False),
)
"""`schema`, `key` (id of the store's key, empty if none), `removals` (counts erasures and removals)."""

tenants = Table(
    "overture_tenants",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", _Text, nullable=False, unique=True),
    # Random, and new if a tenant of this name comes again: a late writer of the old one cannot reach the new one.
    Column("folder", _Text, nullable=False, unique=True),
    Column("key", LargeBinary),  # the tenant's own key, sealed with the store's
)

_OF_TENANT = "overture_tenants.id"

prompts = Table(
    "overture_prompts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tenant", ForeignKey(_OF_TENANT, ondelete="CASCADE"), nullable=False),
    Column("name", _Text, nullable=False),
    Column("current", Integer, nullable=False),
    Column("last", Integer, nullable=False),  # the highest number ever given
    Column("pinned", Boolean, nullable=False),
    Index("overture_prompts_names", "tenant", "name", unique=True),
)

versions = Table(
    "overture_versions",
    metadata,
    Column("prompt", ForeignKey("overture_prompts.id", ondelete="CASCADE"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("sha256", _Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("kind", _Text, nullable=False),
    Column("num_virtual_tokens", Integer, nullable=False),
    Column("architecture", _Text, nullable=False),
    Column("digest", _Text, nullable=False),
    Column("base_name", _Text, nullable=False),
    Column("created", BigInteger, nullable=False),  # microseconds since 1970 in UTC, the same in every database
    Column("details", LargeBinary, nullable=False),  # metadata and metrics as JSON, sealed in an encrypted store
)

states = Table(
    "overture_states",
    metadata,
    Column("tenant", ForeignKey(_OF_TENANT, ondelete="CASCADE"), primary_key=True),
    Column("name", _Text, primary_key=True),
    Column("sha256", _Text, nullable=False),
    Column("size", BigInteger, nullable=False),
)

garbage = Table(
    "overture_garbage",
    metadata,
    Column("folder", _Text, primary_key=True),
    Column("file", _Text, primary_key=True),  # empty: the whole folder
)
"""Files that no record needs and that are still to be deleted, so that a killed removal is finished later."""
