//! What the daemon knows of containers, and keeps across every crash.
//!
//! - `model` is one registration, valid by construction.
//! - `store` is all of them.

pub mod model;
pub mod store;
