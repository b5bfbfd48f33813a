//! What the daemon knows of containers, and keeps across every crash.
//!
//! - `model` is one registration, valid by construction.
//! - `store` is all of them: the watched value, and everything that changes it.
//! - `queue` brings what is asked of one container into one order.

pub mod model;
mod queue;
pub mod store;
