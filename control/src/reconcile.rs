//! From what is seen to what the engine is asked to do.
//!
//! - `fleet` is the planner of all containers, and of the one namespace of `run` and `attach`. Pure.
//! - `observation` is what listens inside one namespace. Pure.
//! - `announced` is what a port broker tells, and is told.
//! - `engine_link` is the engine's process, `departed` what is left of the one before, `reach` the way into one container.
//! - `table` is what people and programs are told of it all.
//! - `task` is the shell around: the engine's channel, the ways into containers, the clock.

pub mod announced;
mod departed;
mod engine_link;
pub mod fleet;
pub mod observation;
mod reach;
pub mod table;
pub mod task;
