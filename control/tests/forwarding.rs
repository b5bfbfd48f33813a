//! Forwarding against real engines and real namespaces, without the daemon around it.
//!
//! This program is also the program of the processes that it starts: an engine and an opener (which always run the
//! current executable), a server inside a namespace, and a driver that may be killed. So it has its own `main` and not
//! the test harness's. An argument without a leading dash filters the tests by name.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on says where")]

#[path = "forwarding/cases.rs"]
mod cases;
#[path = "forwarding/namespace.rs"]
mod namespace;
#[path = "support/ports.rs"]
mod ports;
#[path = "forwarding/session.rs"]
mod session;
#[path = "forwarding/sessions.rs"]
mod sessions;
#[path = "forwarding/world.rs"]
mod world;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("_engine" | "_opener") => return landfall::cli::main(std::env::args_os()),
        Some("_serve") => return namespace::serve(&arguments[2..]),
        Some("_drive") => return world::drive(&arguments[2..]),
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: namespaces are made by root here");
        return ExitCode::SUCCESS;
    }
    let filter = arguments.iter().skip(1).find(|argument| !argument.starts_with('-'));
    let list = arguments.iter().any(|argument| argument == "--list");
    let mut failed = 0;
    for (name, case) in cases::ALL.iter().chain(sessions::ALL) {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        if list {
            println!("{name}: test");
            continue;
        }
        let done = std::panic::catch_unwind(AssertUnwindSafe(*case));
        println!("test {name} ... {}", if done.is_ok() { "ok" } else { "FAILED" });
        failed += usize::from(done.is_err());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
