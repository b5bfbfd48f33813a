//! Claim 25: no process of a root daemon has a capability, except its launcher, and the engine the one for low ports.
//!
//! The launcher is the only way to regain a capability. So a client in the daemon's place sends it every request that it
//! must refuse, as a daemon that was taken over could.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use landfall_engine::channel::Channel;
use landfall_engine::opener::client::Opener;
use landfall_tests::case::Case;
use landfall_tests::process::{descendants, kill, running};
use landfall_tests::{Home, Namespace, Server, TIMEOUT, connect, rpc, wait_until};
use serde_json::{Value, json};

use crate::crash::{by_file, describe, engine_pid, wait_for_open};
use crate::engine_confinement::{Place, StandIn, credentials, is_root};

pub(crate) const CASES: &[Case] = &[
    Case::once("c25_no_process_of_a_root_daemon_has_a_capability", no_capability),
    Case::once("c25_an_opener_of_root_has_two_capabilities_until_it_is_inside", opener_capabilities),
    Case::once("c25_the_launcher_refuses_every_other_request", launcher_refuses),
    Case::once("c25_commands_of_a_folder_run_by_roots_launcher", commands_by_the_launcher),
    Case::once("c25_the_launcher_verifies_the_approval_of_a_command", launcher_verifies),
    Case::once("c25_code_in_roots_daemon_does_not_reach_the_launcher", daemon_taken_over),
    Case::once("c25_a_root_daemon_without_its_launcher_is_replaced_by_up", launcher_lost),
    Case::once("c25_a_launcher_ends_with_its_daemon", launcher_ends),
];

/// `CAP_NET_BIND_SERVICE` alone.
const NET_BIND_SERVICE: &str = "0000000000000400";
const NONE: &str = "0000000000000000";

fn verb_of(pid: u32) -> Option<String> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let verb = arguments.split(|byte| *byte == 0).nth(1)?;
    Some(String::from_utf8_lossy(verb).into_owned())
}

fn no_capability() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let _daemon = home.daemon();
    let (one, other) = (Namespace::new(), Namespace::new());
    rpc::register_with(&home, "a", &by_file(&one));
    rpc::register_with(&home, "b", &by_file(&other));
    let servers = [Server::listen(&one, "127.0.0.1:3000"), Server::listen(&other, "127.0.0.1:3001")];
    wait_for_open(&home, &[("a", 3000), ("b", 3001)]);
    for (port, server) in (3000..).zip(&servers) {
        let _client = connect((Ipv4Addr::LOCALHOST, port));
        server.accept();
    }
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for pid in descendants() {
        let verb = verb_of(pid).expect("every process here is of the daemon");
        *seen.entry(verb.clone()).or_default() += 1;
        let has = credentials(pid);
        let (permitted, no_new_privileges) = match verb.as_str() {
            "_launcher" => continue,
            "_engine" => (NET_BIND_SERVICE, "1"),
            _ => (NONE, "1"),
        };
        for (set, expected) in [
            ("CapPrm", permitted),
            ("CapEff", permitted),
            ("CapBnd", NONE),
            ("CapInh", NONE),
            ("CapAmb", NONE),
        ] {
            assert_eq!(has[set], expected, "{set} of {verb}: {has:?}");
        }
        assert_eq!(has["NoNewPrivs"], no_new_privileges, "{verb}");
    }
    let expected = [("_engine", 1), ("_hostd", 1), ("_launcher", 1), ("_opener", 2)];
    assert_eq!(seen, expected.map(|(verb, count)| (verb.to_owned(), count)).into());
}

fn opener_capabilities() {
    if !is_root() {
        return;
    }
    let (channel, theirs) = Channel::pair().unwrap();
    let mut opener = Command::new(Home::program())
        .arg("_opener")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    // CAP_SYS_PTRACE and CAP_SYS_ADMIN. The opener waits for its target.
    wait_until("the opener to drop the others", || {
        let has = credentials(opener.id());
        let sets =
            ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs"].map(|name| has[name].clone());
        let wanted = ["0000000000280000", "0000000000280000", NONE, NONE, NONE, "1"];
        if sets == wanted { Ok(()) } else { Err(has) }
    });
    let inside = Namespace::new();
    let entered = Opener::over(channel, &inside.target()).unwrap();
    let has = credentials(opener.id());
    for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(has[set], NONE, "{has:?}");
    }
    drop(entered);
    assert!(opener.wait().unwrap().success());
}

/// A launcher whose daemon is this case.
struct Launcher {
    child: Child,
    channel: Channel,
}

impl Launcher {
    fn start(home: &Home) -> Launcher {
        let (channel, theirs) = Channel::pair().unwrap();
        let child = Command::new(Home::program())
            .args(["_launcher", "--home"])
            .arg(home.path())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Launcher { child, channel }
    }

    /// Sends a request with one end of a channel and these descriptors. Returns the other end.
    fn send(&self, request: &Value, more: &[OwnedFd]) -> Channel {
        let (ours, theirs) = Channel::pair().unwrap();
        let descriptors: Vec<_> =
            std::iter::once(theirs.as_fd()).chain(more.iter().map(AsFd::as_fd)).collect();
        self.channel.send_timeout(request, &descriptors, TIMEOUT).unwrap();
        ours
    }

    /// Sends a request. Returns the first part of the answer, if there is one.
    #[track_caller]
    fn ask(&self, request: &Value, more: &[OwnedFd]) -> Option<Value> {
        next_reply(&self.send(request, more))
    }
}

/// Returns the next part of an answer, if there is one.
#[track_caller]
fn next_reply(channel: &Channel) -> Option<Value> {
    channel.recv_timeout(TIMEOUT).unwrap().map(|(answer, _)| answer)
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.channel.shutdown();
        let _ = self.child.wait();
    }
}

fn launcher_refuses() {
    let home = Home::new();
    fs::create_dir_all(home.path().join("run")).unwrap();
    let launcher = Launcher::start(&home);
    let log = || vec![OwnedFd::from(fs::File::options().write(true).open("/dev/null").unwrap())];
    let works = || {
        let path = format!("/proc/{}/ns/net", std::process::id());
        let answer = launcher.ask(&json!({"launch": "namespace", "path": path}), &[]);
        assert_eq!(answer, Some(json!({"reply": "done"})), "the launcher continues");
    };
    works();
    for socket in
        ["../../etc/landfall.sock", "hostd.sock", "engine.sock/../hostd.sock", "/run/x", "", "engine."]
    {
        let answer = launcher.ask(&json!({"launch": "engine", "socket": socket}), &log());
        assert_eq!(answer.unwrap()["refusal"], "invalid", "{socket}");
    }
    // The log descriptor is missing.
    let answer = launcher.ask(&json!({"launch": "engine", "socket": "engine.sock"}), &[]);
    assert_eq!(answer.unwrap()["refusal"], "invalid");
    for path in [
        "/etc/shadow",
        "/proc/1/root/etc/shadow",
        "/proc/1/mem",
        "/proc/1/ns/mnt",
        "/proc/1/fd/../root",
        "/dev/null",
    ] {
        let answer = launcher.ask(&json!({"launch": "namespace", "path": path}), &[]);
        assert_eq!(answer.unwrap()["refusal"], "invalid", "{path}");
    }
    let inodes: Vec<u64> = (0..2000).collect();
    assert_eq!(
        launcher.ask(&json!({"launch": "owners", "inodes": inodes}), &[]).unwrap()["refusal"],
        "invalid"
    );
    // Invalid requests are dropped with their descriptors.
    for request in [
        json!({"launch": "execute", "program": "/bin/true"}),
        json!({"launch": "opener", "program": "/bin/true"}),
        json!({"launch": "engine", "socket": "engine.sock", "arguments": ["--x"]}),
        json!("opener"),
        json!(null),
        json!({"launch": "owners", "inodes": "x".repeat(100_000)}),
    ] {
        assert_eq!(launcher.ask(&request, &log()), None, "{request}");
    }
    // The first descriptor is not a channel, or is missing.
    let file = log();
    launcher.channel.send(&json!({"launch": "opener"}), &[file[0].as_fd()]).unwrap();
    launcher.channel.send(&json!({"launch": "opener"}), &[]).unwrap();
    works();
    let children: Vec<u32> = descendants().into_iter().filter(|pid| *pid != launcher.child.id()).collect();
    assert!(children.is_empty(), "{children:?} were started");
}

fn commands_by_the_launcher() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let folder = home.folder("shop");
    let status = home.folder("outside").join("status");
    // Renamed, so that a reader sees the whole file.
    let script = "cat /proc/$$/status > $1.new; mv $1.new $1";
    let command = json!(["sh", "-c", script, "sh", status]);
    fs::write(folder.join("landfall.toml"), format!("[jobs.x]\ncommand = {command}\nevery = \"1h\"\n"))
        .unwrap();
    home.trust(&folder);
    let daemon = home.daemon();
    rpc::register(&home, "shop");
    let status = wait_until("the command to run", || fs::read_to_string(&status));
    let launcher = running("_launcher")[0];
    assert!(status.contains(&format!("\nPPid:\t{launcher}\n")), "{status}");
    // It runs with root's capabilities, as before the split of the daemon.
    let all = &credentials(launcher)["CapEff"];
    assert!(
        status.contains(&format!("\nCapEff:\t{all}\n")) && status.contains("\nNoNewPrivs:\t0\n"),
        "{status}"
    );
    home.wait_for_event("job-tick-ok", |event| event["containerName"] == "shop");
    daemon.shut_down();
}

fn launcher_verifies() {
    let home = Home::new();
    let folder = home.folder("shop").canonicalize().unwrap();
    let settings = "[jobs.x]\ncommand = [\"sleep\", \"1000\"]\nevery = \"1h\"\n\
                    [jobs.y]\ncommand = [\"sh\", \"-c\", \"echo $PWD; exit 3\"]\nevery = \"1h\"\n";
    fs::write(folder.join("landfall.toml"), settings).unwrap();
    home.trust(&folder);
    let launcher = Launcher::start(&home);
    let request = |folder: &Path, words: &[&str], settings: &str| {
        json!({"launch": "command", "settings": settings,
            "invocation": {"words": words, "folder": folder, "container": "shop", "build": null}})
    };
    let output = || {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader, vec![OwnedFd::from(writer)])
    };
    let (sleep, echo) = (["sleep", "1000"], ["sh", "-c", "echo $PWD; exit 3"]);
    let elsewhere = home.folder("elsewhere").canonicalize().unwrap();
    for (what, request) in [
        ("text that is not approved", request(&folder, &sleep, &settings.replace("1h", "2h"))),
        ("no text", request(&folder, &sleep, "")),
        ("another folder", request(&elsewhere, &sleep, settings)),
        ("a way to the folder that is not its own", request(&folder.join("../shop"), &sleep, settings)),
        ("another command", request(&folder, &["sleep", "1001"], settings)),
        ("a part of a command", request(&folder, &["sleep"], settings)),
        ("no command", request(&folder, &[], settings)),
    ] {
        let answer = launcher.ask(&request, &output().1).unwrap();
        assert_eq!(answer, json!({"reply": "refused", "refusal": "not-approved"}), "{what}");
    }
    let answer = launcher.ask(&request(&folder, &sleep, settings), &[]).unwrap();
    assert_eq!(answer["refusal"], "invalid", "without an output");

    let (mut reader, writer) = output();
    let channel = launcher.send(&request(&folder, &echo, settings), &writer);
    drop(writer);
    assert_eq!(next_reply(&channel), Some(json!({"reply": "started"})));
    assert_eq!(next_reply(&channel), Some(json!({"reply": "exited", "status": 3 << 8})));
    let mut printed = String::new();
    reader.read_to_string(&mut printed).unwrap();
    assert_eq!(printed.trim_end(), folder.to_str().unwrap());

    // It ends when its requester disconnects, and with the daemon.
    let commands = || descendants().into_iter().filter(|pid| verb_of(*pid).as_deref() == Some("1000"));
    let ended = || match commands().count() {
        0 => Ok(()),
        left => Err(left),
    };
    let (_reader, writer) = output();
    let channel = launcher.send(&request(&folder, &sleep, settings), &writer);
    assert_eq!(next_reply(&channel), Some(json!({"reply": "started"})));
    wait_until("the command", || commands().next().ok_or("it does not run"));
    drop(channel);
    wait_until("the command to end with its channel", ended);
    let channel = launcher.send(&request(&folder, &sleep, settings), &writer);
    assert_eq!(next_reply(&channel), Some(json!({"reply": "started"})));
    // The kernel closes the descriptors of a killed daemon like this.
    drop(channel);
    drop(launcher);
    wait_until("the command to end with the launcher", ended);
}

fn daemon_taken_over() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let launcher = running("_launcher");
    assert_eq!(launcher.len(), 1, "{launcher:?}");
    let stand_in = StandIn::start("daemon", launcher[0], &home, &Place::new());
    let like = |pid| {
        let mut has = credentials(pid);
        has.retain(|name, _| !name.starts_with("Seccomp"));
        has
    };
    assert_eq!(like(daemon.pid()), like(stand_in.pid()), "the stand-in is not the daemon's like");
    for attempt in [
        "take a descriptor of the daemon",
        "trace the daemon",
        "enter a namespace",
        "mount",
        "open a packet socket",
        "listen at port 80",
    ] {
        assert_ne!(stand_in.outcome(attempt), "done", "{attempt}");
    }
}

fn launcher_lost() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    // Started by `up`, which must find it again.
    let up = || {
        let output = home.run(&["up", "--json", "--http-port", "0"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let first = up();
    assert_eq!(first["outcome"], "started");
    let inside = Namespace::new();
    rpc::register_with(&home, "a", &by_file(&inside));
    let server = Server::listen(&inside, "127.0.0.1:3000");
    let description = wait_for_open(&home, &[("a", 3000)]);
    assert_eq!(description["launcher"], "running");
    let engine = engine_pid(&description);
    kill(running("_launcher")[0]);
    home.wait_for_event("notice", |event| {
        event["text"].as_str().unwrap().contains("launcher of this daemon has ended")
    });
    assert_eq!(describe(&home)["launcher"], "ended");
    let status = String::from_utf8(home.run(&["status"]).stdout).unwrap();
    assert!(status.contains("launcher") && status.contains("landfall up"), "{status}");
    // The open forward works.
    let _client = connect((Ipv4Addr::LOCALHOST, 3000));
    server.accept();
    // A request that needs a capability reports the missing launcher.
    let other = Namespace::new();
    rpc::register_with(&home, "b", &by_file(&other));
    wait_until("the second container to be refused", || {
        let description = describe(&home);
        let reason = description["containers"][1]["reason"].as_str().unwrap_or_default().to_owned();
        if reason.contains("landfall up") || reason.contains("Permission denied") {
            Ok(())
        } else {
            Err(description)
        }
    });
    let second = up();
    assert_eq!(second["outcome"], "upgraded");
    assert_ne!(second["pid"], first["pid"]);
    let _server = Server::listen(&other, "127.0.0.1:3001");
    let description = wait_for_open(&home, &[("a", 3000), ("b", 3001)]);
    assert_eq!((description["launcher"].clone(), engine_pid(&description)), (json!("running"), engine));
    assert_eq!(up()["outcome"], "reused");
    assert!(home.run(&["down"]).status.success());
}

fn launcher_ends() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let daemon = home.daemon();
    let inside = Namespace::new();
    rpc::register_with(&home, "a", &by_file(&inside));
    let server = Server::listen(&inside, "127.0.0.1:3000");
    let engine = engine_pid(&wait_for_open(&home, &[("a", 3000)]));
    let launcher = running("_launcher")[0];
    daemon.kill();
    wait_until("the launcher to end", || match running("_launcher") {
        left if left.is_empty() => Ok(()),
        left => Err(left),
    });
    // The engine continues, and the next daemon starts a launcher.
    let _client = connect((Ipv4Addr::LOCALHOST, 3000));
    server.accept();
    let _daemon = home.daemon();
    let description = wait_for_open(&home, &[("a", 3000)]);
    assert_eq!(engine_pid(&description), engine);
    assert_ne!(running("_launcher"), [launcher]);
}
