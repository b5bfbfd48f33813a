//! What the daemon knows of containers, and keeps across every crash.
//!
//! - `model` is one registration, valid by construction; `file` is the same on disk.
//! - `store` is all of them: the watched value, and what may be asked; `shared` has the changes themselves.
//! - `queue` brings what is asked of one container into one order.
//! - `upkeep` takes in what is on disk at the start, and drops what has gone; `misses` decides when it has.

pub mod file;
mod misses;
pub mod model;
mod queue;
mod shared;
pub mod store;
mod upkeep;
