//! `landfall doctor`: tests what this machine allows by doing it.

mod docker;
mod helper;
mod http;

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use landfall_engine::native::{InstallError, Supervisor};
use landfall_engine::opener::client::{Opener, Target};
use landfall_engine::watch::hint::{HintError, Hints};
use rustix::process::Resource;
use serde::Serialize;

use super::args::DoctorArgs;
use super::exit::{Exit, Failure};
use crate::cli::ui::output::{Colour, Printer};
use crate::error::chain;
use crate::sys::sandbox::{Sandbox, SandboxError, Step, pasta};

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// As required.
    Ok,
    /// Missing; landfall works without it.
    Lack,
    /// Missing; forwarding does not work without it.
    Broken,
}

/// The result of one test.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, detail: impl Into<String>) -> Finding {
        Finding { what, state: State::Ok, detail: detail.into(), hint: None }
    }

    fn lack(what: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { what, state: State::Lack, detail: detail.into(), hint: Some(hint.into()) }
    }

    fn broken(what: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { state: State::Broken, ..Finding::lack(what, detail, hint) }
    }
}

/// Runs all tests, prints the findings, and returns whether forwarding works.
pub fn doctor(args: &DoctorArgs) -> Result<Exit, Failure> {
    let (namespaces, entry, native) = namespaces();
    let (docker, docker_entry, needs_helper) = docker::docker();
    let helper = helper::helper(needs_helper);
    let findings = [
        namespaces,
        entry,
        native,
        loopback_v4(),
        loopback_v6(),
        io_uring(),
        tracefs(),
        docker,
        docker_entry,
        helper,
        http::http(),
        congestion(),
        outbound(),
        descriptors(),
    ];
    let works = findings.iter().all(|finding| finding.state != State::Broken);
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&serde_json::json!({ "works": works, "findings": findings }).to_string());
    } else {
        findings.iter().for_each(|finding| printer.print(&line(&printer, finding)));
        printer.print(if works { "\nforwarding works here" } else { "\nforwarding does not work here" });
    }
    Ok(if works { Exit::Ok } else { Exit::Unfit })
}

fn line(printer: &Printer, finding: &Finding) -> String {
    let word = match finding.state {
        State::Ok => printer.paint("ok    ", Colour::Green),
        State::Lack => printer.paint("lack  ", Colour::Yellow),
        State::Broken => printer.paint("broken", Colour::Red),
    };
    let hint = finding.hint.as_ref().map(|hint| format!("\n       hint: {hint}")).unwrap_or_default();
    format!("{word} {:<20} {}{hint}", finding.what, finding.detail)
}

/// Tests by creating a sandbox, entering it, and installing the filter of native sockets.
fn namespaces() -> (Finding, Finding, Finding) {
    const MAKE: &str = "user namespaces";
    const ENTER: &str = "setns";
    let sandbox = match Sandbox::make(&[]) {
        Ok(sandbox) => sandbox,
        Err(error) => {
            let enter = Finding::lack(
                ENTER,
                "not tried, since there is no namespace to enter",
                user_namespace_hint(),
            );
            let native = Finding::lack(NATIVE, "not tried, since there is no sandbox", user_namespace_hint());
            return (Finding::broken(MAKE, chain(&error), hint_for(&error)), enter, native);
        }
    };
    let entered =
        Target::process(sandbox.pid()).and_then(|target| Opener::spawn(Path::new("/proc/self/exe"), target));
    let enter = match entered {
        Ok(_) => Finding::ok(ENTER, "a new namespace can be entered"),
        Err(error) => Finding::broken(
            ENTER,
            chain(&error),
            "a sandbox around landfall (seccomp, AppArmor) forbids setns; run landfall outside of it, or use an agent \
             inside each container (landfall register --agent DIR) or its WebSocket (--websocket)",
        ),
    };
    let make = if sandbox.has_user_namespace() {
        Finding::ok(MAKE, "a user and network namespace can be created")
    } else {
        Finding::lack(MAKE, "only root can run commands, in a network namespace", user_namespace_hint())
    };
    (make, enter, native_sockets(&sandbox))
}

const NATIVE: &str = "native sockets";

/// Tests whether servers under `run` can listen on sockets of the host.
fn native_sockets(sandbox: &Sandbox) -> Finding {
    let refused = |error: &dyn std::error::Error, hint: &str| Finding::lack(NATIVE, chain(error), hint);
    let relayed = "servers under `run` are relayed instead";
    if let Err(error) = Supervisor::prepare() {
        return refused(
            &error,
            "raise the limit: sysctl -w fs.inotify.max_user_instances=512; until then servers are relayed",
        );
    }
    match sandbox.filter() {
        Ok(Ok(_)) => Finding::ok(NATIVE, "servers under `run` listen directly on the host's localhost"),
        Ok(Err(InstallError::Nested)) => refused(
            &InstallError::Nested,
            "landfall itself runs under a seccomp supervisor; run it outside of that",
        ),
        Ok(Err(error)) => refused(&error, relayed),
        Err(error) => refused(&error, relayed),
    }
}

fn hint_for(error: &SandboxError) -> String {
    match error {
        SandboxError::Step { step: Step::Unshare, .. } | SandboxError::Map(..) => user_namespace_hint(),
        _ => "check that /proc is mounted and processes can be started".to_owned(),
    }
}

/// Returns the hint for a machine on which user namespaces cannot be created. The settings are checked in the order in
/// which the kernel and the distributions apply them.
pub fn user_namespace_hint() -> String {
    let setting = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok()?;
        text.trim().parse::<u64>().ok()
    };
    if setting("user.max_user_namespaces") == Some(0) {
        return "user namespaces are disabled: sysctl -w user.max_user_namespaces=10000".to_owned();
    }
    if setting("kernel.unprivileged_userns_clone") == Some(0) {
        return "only root may create user namespaces: sysctl -w kernel.unprivileged_userns_clone=1"
            .to_owned();
    }
    if setting("kernel.apparmor_restrict_unprivileged_userns") == Some(1) {
        return "AppArmor denies user namespaces to programs without a profile: \
                sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give landfall a profile"
            .to_owned();
    }
    "inside a container, allow user namespaces for it (seccomp, AppArmor), or run landfall on the host"
        .to_owned()
}

fn loopback_v4() -> Finding {
    match TcpListener::bind(("127.0.0.1", 0)) {
        Ok(_) => Finding::ok("IPv4 loopback", "127.0.0.1 accepts listeners"),
        Err(error) => Finding::broken(
            "IPv4 loopback",
            error.to_string(),
            "bring up the loopback interface: ip link set lo up",
        ),
    }
}

fn loopback_v6() -> Finding {
    match TcpListener::bind(("::1", 0)) {
        Ok(_) => Finding::ok("IPv6 loopback", "::1 accepts listeners"),
        Err(error) => Finding::lack(
            "IPv6 loopback",
            format!("only 127.0.0.1 is served: {}", chain(&error)),
            "enable it: sysctl -w net.ipv6.conf.lo.disable_ipv6=0",
        ),
    }
}

fn io_uring() -> Finding {
    const WHAT: &str = "io_uring";
    let report = match crate::cli::foreground::ring() {
        Ok(report) => report,
        Err(error) => {
            return Finding::broken(
                WHAT,
                chain(&error),
                "neither io_uring nor epoll works; check ulimit -n and ulimit -l",
            );
        }
    };
    let Some(reason) = report.reason else { return Finding::ok(WHAT, "in use") };
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let hint = match disabled.trim() {
        "1" | "2" => "enable it: sysctl -w kernel.io_uring_disabled=0; until then landfall uses epoll",
        _ => "it needs Linux 6.1 and no seccomp filter that forbids it; until then landfall uses epoll",
    };
    Finding::lack(WHAT, reason, hint)
}

/// Tests the tracepoint that reports new listeners at once; without it the socket tables are polled.
fn tracefs() -> Finding {
    const WHAT: &str = "tracefs";
    let error = match Hints::open() {
        Ok(_) => return Finding::ok(WHAT, "the kernel reports new listeners at once"),
        Err(error) => error,
    };
    let hint = match &error {
        HintError::Absent => {
            "for faster detection of listeners: mount -t tracefs tracefs /sys/kernel/tracing"
        }
        HintError::Forbidden | HintError::Refused { .. } => {
            "new listeners are detected by polling, about 20 ms later"
        }
    };
    Finding::lack(WHAT, chain(&error), hint)
}

/// Tests for BBR, which paces loopback to a third of its speed. The relay selects cubic for its own sockets, but not
/// for those of the servers inside.
fn congestion() -> Finding {
    const WHAT: &str = "congestion control";
    let default = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
    match default.trim() {
        "bbr" => Finding::lack(
            WHAT,
            "bbr paces loopback; the relay uses cubic on its own sockets",
            "for faster servers inside: sysctl -w net.ipv4.tcp_congestion_control=cubic",
        ),
        other => Finding::ok(WHAT, other),
    }
}

fn outbound() -> Finding {
    match pasta::find() {
        Some(path) if !pasta::tun_is_usable() => Finding::lack(
            "pasta",
            format!("{} cannot open /dev/net/tun", path.display()),
            "chmod 666 /dev/net/tun, the default of distributions",
        ),
        Some(path) => {
            let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            if only_loopback_resolvers(&resolver) {
                return Finding::lack(
                    "pasta",
                    format!("{}; host names will not resolve under `run`", path.display()),
                    "the name server in /etc/resolv.conf is on the host's loopback, which a sandbox cannot reach",
                );
            }
            Finding::ok("pasta", path.display().to_string())
        }
        None => Finding::lack(
            "pasta",
            "commands under `run` have no outbound network",
            "install passt, which contains pasta",
        ),
    }
}

fn only_loopback_resolvers(resolv_conf: &str) -> bool {
    let mut servers = resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|server| server.trim().parse::<std::net::IpAddr>().ok())
        .peekable();
    servers.peek().is_some() && servers.all(|server| server.is_loopback())
}

/// Tests the limit of file descriptors. A relayed connection needs two, and two more for a pipe while it moves bulk
/// data.
fn descriptors() -> Finding {
    const ENOUGH: u64 = 4096;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let detail = format!("soft limit {}, hard limit {}", show(limit.current), show(limit.maximum));
    if most >= ENOUGH {
        Finding::ok("descriptors", detail)
    } else {
        Finding::lack(
            "descriptors",
            detail,
            "raise the hard limit (ulimit -Hn); a relayed connection needs two",
        )
    }
}

fn show(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_resolver_is_unreachable_inside() {
        assert!(only_loopback_resolvers("nameserver 127.0.0.53\noptions edns0\n"));
        assert!(!only_loopback_resolvers("nameserver 127.0.0.53\nnameserver 192.0.2.1\n"));
        assert!(!only_loopback_resolvers("search lan\n"));
    }
}
