//! From what is seen to what the engine is asked to do.
//!
//! - `fleet` is the planner of all containers. Pure.
//! - `observation` is what listens inside one namespace. Pure.
//! - `plan` is the planner of one namespace. Pure.
//! - `engine_link` is the engine's process, `reach` the way into one container.
//! - `table` is what people and programs are told of it all.
//! - `task` is the shell around: the engine's channel, the ways into containers, the clock.

mod engine_link;
pub mod fleet;
pub mod observation;
pub mod plan;
mod reach;
mod readiness;
pub mod table;
pub mod task;
