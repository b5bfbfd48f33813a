//! Forwarding: compares the ports that listen in registered containers with the listeners of the engine, and gives the
//! engine the commands that close the gap.
//!
//! - `planner` holds the whole state and computes the commands. Pure. Its documentation has the states of a port.
//! - `driver` is the task around the planner: registrations, container tasks, broker sessions, the engine's events, the clock.
//! - `entry` is the task of one container: it locates the container, enters its namespace, watches for its end, and retries.
//! - `broker_link` carries messages between a broker's session and the driver.
//! - `engine_link` starts, finds and upgrades the engine's process; `departed` waits until a lost engine's ports are free.
//!
//! How a port becomes a forward:
//!
//! 1. A registration reaches the driver, which starts the container's task (`driver::event_loop`).
//! 2. The task locates the container and enters its namespace (`entry`).
//! 3. The driver adds the namespace to the engine as an upstream (`driver::task_events`).
//! 4. The engine's watch reports a listener, and the planner records it (`planner::engine_events`).
//! 5. The planner judges the port by the policy (`planner::verdict`), and commands a listener on the host
//!    (`planner::watched`).
//! 6. The engine answers that the listener is open, and the driver reports it (`driver::reporting`).
//!
//! A port of a container that cannot be entered comes from the announcements of its broker's session instead of steps 2 to 4
//! (`driver::brokers`, `planner::announced`).
//!
//! Only the driver sends commands to the engine, so their order is the order of the planner's decisions. No two forwards
//! hold one host port.

pub mod broker_link;
mod departed;
pub mod driver;
mod engine_link;
mod entry;
pub mod planner;
