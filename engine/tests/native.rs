//! Native sockets in real namespaces, as root and as an unprivileged user.
//!
//! This program also plays the other roles of the tests: with `_inside` it is a program in a sandbox that carries out
//! requests from a channel, with `_child` a child of that program. It moves into a network namespace of its own, which is
//! the host of its cases, so that ports are free. As root it runs all cases, and then again as the user `nobody`. An
//! argument selects the cases whose names contain it.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, in a program with its own main")]

#[path = "native/cases.rs"]
mod cases;
#[path = "native/inside.rs"]
mod inside;
#[path = "native/sandbox.rs"]
mod sandbox;
#[path = "native/stress.rs"]
mod stress;

use std::io::Write;
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, unshare};

const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

type Case = (&'static str, fn());

const CASES: &[Case] = &[
    ("a_server_answers_on_the_host_and_inside", cases::answers),
    ("each_address_has_its_place", cases::addresses),
    ("options_are_copied", cases::options),
    ("blocking_and_close_on_exec_are_kept", cases::flags),
    ("every_duplicate_is_replaced", cases::duplicates),
    ("a_socket_in_an_epoll_set_stays_inside", cases::epoll),
    ("other_sockets_are_left_alone", cases::others),
    ("a_denied_port_stays_inside", cases::denied),
    ("a_closed_port_is_free_at_once_and_is_bound_again", cases::restarts),
    ("a_killed_server_frees_its_port", cases::killed),
    ("a_foreign_listener_makes_listen_fail_or_stay_inside", cases::conflict),
    ("c26_two_sandboxes_never_share_a_port", cases::never_shared),
    ("servers_of_one_sandbox_share_a_port", cases::shared_by_workers),
    ("children_of_a_parent_that_bound_listen_in_turn", cases::parent_binds),
    ("a_child_that_holds_the_socket_leaves_it_inside", cases::child_holds),
    ("c26_no_other_host_reaches_a_native_socket", cases::other_host),
    ("a_second_listener_of_notifications_is_refused", cases::nested),
    ("a_filter_that_forbids_seccomp_is_named", cases::forbidden),
    ("many_threads_listen_at_once", stress::threads),
    ("short_lived_servers_leave_nothing_behind", stress::short_lived),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("_inside") => return inside::main(&arguments[1..]),
        Some("_child") => return inside::child(),
        _ => {}
    }
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-'));
    let root = rustix::process::geteuid().is_root();
    let this = std::env::current_exe().unwrap();
    if root {
        let status = Command::new("setpriv").args(NOBODY).arg(&this).args(&arguments).status().unwrap();
        if !status.success() {
            return ExitCode::FAILURE;
        }
    }
    enter_own_host();
    for (name, case) in CASES {
        if wanted.is_none_or(|wanted| name.contains(wanted.as_str())) {
            print!("test {name} ({}) ... ", if root { "root" } else { "nobody" });
            std::io::stdout().flush().unwrap();
            // A case that fails panics, which ends the program with its message.
            case();
            println!("ok");
        }
    }
    ExitCode::SUCCESS
}

/// Moves into a network namespace that is the host of all cases.
fn enter_own_host() {
    if rustix::process::geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
    } else {
        inside::leave(true);
    }
    inside::loopback_up();
}
