//! Forwarding: compares the ports that listen in registered containers with the listeners of the engine, and gives the
//! engine the commands that close the gap.
//!
//! - `planner` holds the whole state and computes the commands. Pure. Its documentation has the states of a port.
//! - `driver` is the task around the planner: registrations, container tasks, broker sessions, the engine's events, the clock.
//! - `entry` is the task of one container: it locates the container, enters its namespace, watches for its end, and retries.
//! - `broker_link` carries messages between a broker's session and the driver.
//! - `engine_link` starts, finds and upgrades the engine's process; `departed` waits until a lost engine's ports are free.
//!
//! Only the driver sends commands to the engine, so their order is the order of the planner's decisions. No two forwards
//! hold one host port.

pub mod broker_link;
mod departed;
pub mod driver;
mod engine_link;
mod entry;
pub mod planner;
