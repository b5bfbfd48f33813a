//! The registry: one record for each container, which survives a crash at any time, and the state that belongs to a record.
//!
//! - `store` is the watched list of all registrations; `file` is one of them on disk; `shared` holds the changes themselves.
//! - `queue` runs the changes to one name one after another.
//! - `garbage_collection` replays the files at the start and drops containers that are gone; `miss_counter` decides when.
//! - `folder` reads `landfall.toml` and runs its commands; `trust_file` keeps the user's approvals; `secrets` patches
//!   secrets.
//!
//! A name is unknown, registered, or being removed (in its queue). A change is acknowledged only after it is on disk. A
//! command of a folder never runs without an approval of exactly the bytes of its file.

pub mod file;
pub mod folder;
pub(crate) mod garbage_collection;
pub mod grants;
pub(crate) mod miss_counter;
pub(crate) mod queue;
pub mod secrets;
pub(crate) mod shared;
pub mod store;
pub mod trust_file;
