//! The daemon's socket, row by row of the wire specification, A.1: exact bytes in both directions.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use landfall_tests::case::Case;
use landfall_tests::rpc::{Wire, ask, done, exchange, http_port, names, refused, register, registration};
use landfall_tests::{Home, NEGATIVE_WAIT, note, wait_until};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case::once("rpc_one_line_gets_one_answer_and_the_end_of_the_stream", one_line_one_answer),
    Case::once("c24_rpc_a_line_of_65535_characters_is_read_and_a_longer_one_refused", the_longest_line),
    Case::once("c24_rpc_a_giant_line_uses_bounded_memory", a_giant_line),
    Case::once("rpc_several_lines_get_one_answer", several_lines),
    Case::once("rpc_an_invalid_request_is_refused_with_a_reason", no_request),
    Case::once("rpc_a_request_may_come_byte_by_byte", byte_by_byte),
    Case::once("rpc_a_character_may_be_split_between_reads", a_split_character),
    Case::once("rpc_a_client_that_disconnects_in_the_middle_leaks_no_resource", disconnect_in_the_middle),
    Case::once("c24_rpc_a_client_that_never_ends_its_line_is_disconnected_after_ten_seconds", never_ending),
    Case::once("c24_rpc_a_thousand_silent_clients_do_not_stop_the_daemon", silent_clients),
    Case::once("c24_the_socket_and_the_other_files_are_accessible_to_their_owner_only", modes),
    Case::once("c24_another_user_is_refused_even_with_open_modes", another_user),
    Case::once("rpc_version_and_http_info_return_build_and_port", version_and_http_info),
    Case::once("rpc_shutdown_is_answered_before_it_takes_effect", shutdown),
    Case::once("rpc_two_shutdowns_are_both_answered_and_reported_once", two_shutdowns),
    Case::once("rpc_events_arrive_as_they_happen", events_arrive),
];

const LIST: &str = "{\"kind\":\"list\"}\n";

fn one_line_one_answer() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut wire = Wire::connect(&home);
    wire.send(LIST);
    assert_eq!(wire.rest(), "{\"ok\":true,\"result\":{\"registrations\":[]}}\n");
    // Unknown fields and white space are ignored.
    assert_eq!(exchange(&home, " { \"kind\" : \"list\", \"id\" : 7 } \r\n")["ok"], true);
}

fn the_longest_line() {
    let home = Home::new();
    let _daemon = home.daemon();
    let line = |length: usize| {
        let start = "{\"kind\":\"list\",\"pad\":\"";
        format!("{start}{}\"}}", "x".repeat(length - start.len() - 2))
    };
    assert_eq!(exchange(&home, line(65_535) + "\n")["ok"], true);
    let too_long = json!({"ok": false, "reason": "request exceeds buffer limit"});
    // One byte more, including its newline, is too long whether or not the newline has arrived.
    assert_eq!(exchange(&home, line(65_536) + "\n"), too_long);
    assert_eq!(exchange(&home, "x".repeat(65_537)), too_long);
    // No answer is sent as long as the line may still be valid.
    let mut wire = Wire::connect(&home);
    wire.send(line(65_535));
    assert!(wire.is_silent_for(NEGATIVE_WAIT), "a line that may still end was answered");
    wire.send("\n");
    assert_eq!(wire.answer()["ok"], true);
    // The limit counts bytes, not characters.
    let wide = format!("{{\"kind\":\"list\",\"pad\":\"{}\"}}\n", "é".repeat(33_000));
    assert!(wide.chars().count() < 65_536);
    assert_eq!(exchange(&home, wide), too_long);
}

fn a_giant_line() {
    let home = Home::new();
    let daemon = home.daemon();
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    };
    let before = resident();
    let mut clients = Vec::new();
    for _ in 0..16 {
        let mut wire = Wire::connect(&home);
        // The daemon may close the connection in the middle of the line.
        let _ = wire.try_send(vec![b'x'; 8 << 20]);
        clients.push(wire);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "16 clients made the daemon grow by {grown} bytes");
    for mut wire in clients {
        assert_eq!(wire.answer(), json!({"ok": false, "reason": "request exceeds buffer limit"}));
    }
}

fn several_lines() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut wire = Wire::connect(&home);
    let second = registration(&home, "second", &json!({}));
    wire.send(format!("{{\"kind\":\"version\"}}\n{second}\n{LIST}"));
    assert!(wire.answer()["result"]["version"].is_string());
    // Only the first line has an effect.
    assert!(names(&home).is_empty());
}

fn no_request() {
    let home = Home::new();
    let _daemon = home.daemon();
    let invalid_json =
        ["\n", "\r\n", "nonsense\n", "{\"kind\":\"list\"\n", "{\"kind\":\"list\"} x\n", "{'kind':'list'}\n"];
    for line in invalid_json {
        assert_eq!(exchange(&home, line), json!({"ok": false, "reason": "invalid request json"}), "{line:?}");
    }
    let not_text: &[u8] = b"{\"kind\":\"list\",\"x\":\"\xff\xfe\"}\n";
    assert_eq!(exchange(&home, not_text), json!({"ok": false, "reason": "invalid request json"}));
    for line in ["null\n", "[]\n", "7\n", "\"list\"\n", "true\n"] {
        assert_eq!(exchange(&home, line), json!({"ok": false, "reason": "invalid request"}), "{line:?}");
    }
    for line in [
        "{}\n",
        "{\"kind\":\"dance\"}\n",
        "{\"kind\":\"List\"}\n",
        "{\"kind\":null}\n",
        "{\"kind\":[\"list\"]}\n",
    ] {
        let answer = exchange(&home, line);
        let reason = answer["reason"].as_str().unwrap_or_default();
        assert!(["unknown request kind", "invalid request"].contains(&reason), "{line:?}: {answer}");
    }
    assert_eq!(refused(&home, &json!({"kind": "dance"})), "unknown request kind");
    // A nesting depth that would overflow the stack of a recursive parser.
    let deep = format!("{}{}\n", "[".repeat(30_000), "]".repeat(30_000));
    assert_eq!(exchange(&home, deep)["ok"], false);
    assert_eq!(names(&home), Vec::<String>::new());
}

fn byte_by_byte() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut wire = Wire::connect(&home);
    let request = registration(&home, "slow", &json!({})).to_string() + "\n";
    for byte in request.as_bytes() {
        wire.send([*byte]);
    }
    assert_eq!(wire.answer(), json!({"ok": true}));
    assert_eq!(names(&home), ["slow"]);
}

fn a_split_character() {
    let home = Home::new();
    let _daemon = home.daemon();
    // Two, three and four bytes, split at every position. Each piece is read separately, because the answer to another
    // client's next line comes between.
    let cwd = home.folder("großes-模型-🦀");
    let request = json!({"kind": "register", "containerName": "wide", "cwd": cwd}).to_string() + "\n";
    let bytes = request.as_bytes();
    let inside = (1..bytes.len()).filter(|at| !request.is_char_boundary(*at));
    for at in inside {
        let mut wire = Wire::connect(&home);
        wire.send(&bytes[..at]);
        assert!(done(&home, &json!({"kind": "version"}))["version"].is_string());
        wire.send(&bytes[at..]);
        assert_eq!(wire.answer(), json!({"ok": true}), "split at {at}");
        let status = done(&home, &json!({"kind": "status", "containerName": "wide"}));
        assert_eq!(status["cwd"], cwd.to_str().unwrap(), "split at {at}");
    }
}

fn disconnect_in_the_middle() {
    let home = Home::new();
    let daemon = home.daemon();
    let open = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    assert_eq!(ask(&home, &json!({"kind": "list"}))["ok"], true);
    let before = open();
    for round in 0..100 {
        let mut wire = Wire::connect(&home);
        match round % 4 {
            0 => wire.send("{\"kind\":\"li"),
            1 => wire.send(LIST),
            2 => wire.finish(),
            _ => {
                // A line without a newline before the end is not a request.
                wire.send("{\"kind\":\"list\"}");
                wire.finish();
                assert!(!wire.rest().contains("\"ok\":true"));
            }
        }
    }
    wait_until("the daemon to release its clients", || {
        let now = open();
        if now <= before { Ok(()) } else { Err((now, before)) }
    });
    assert!(names(&home).is_empty());
}

fn never_ending() {
    let home = Home::new();
    let _daemon = home.daemon();
    let start = Instant::now();
    let mut silent = Wire::connect(&home);
    let mut trickling = Wire::connect(&home);
    let mut trickle = Vec::new();
    while start.elapsed() < Duration::from_secs(9) {
        assert!(trickling.try_send("x").is_ok(), "disconnected after {:?}", start.elapsed());
        trickle.push(b'x');
        assert!(trickling.is_silent_for(NEGATIVE_WAIT), "disconnected after {:?}", start.elapsed());
    }
    // Single bytes from time to time do not extend the deadline.
    let _ = (silent.rest(), trickling.rest());
    let taken = start.elapsed();
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(15)).contains(&taken),
        "disconnected after {taken:?}"
    );
    assert_eq!(exchange(&home, LIST)["ok"], true);
}

fn silent_clients() {
    let home = Home::new();
    let mut daemon = home.daemon();
    let mut crowd = Vec::new();
    for _ in 0..1000 {
        // Above its limit the daemon may refuse connections, or leave them in the kernel's backlog.
        match UnixStream::connect(home.socket()) {
            Ok(stream) => crowd.push(stream),
            Err(_) => break,
        }
    }
    let held = crowd.len();
    assert!(daemon.has_ended().is_none(), "{held} clients ended the daemon");
    drop(crowd);
    wait_until("an answer after the crowd", || {
        let Ok(mut wire) = Wire::try_connect(&home) else { return Err("no connection".to_owned()) };
        let answer = wire.try_send(LIST).map(|()| wire.rest());
        if answer.as_ref().is_ok_and(|text| text.contains("\"ok\":true")) {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    });
}

fn modes() {
    let home = Home::new();
    // The daemon corrects modes that a permissive umask or an earlier release left open.
    std::fs::create_dir_all(home.path().join("run/registrations")).unwrap();
    let _daemon = home.daemon();
    register(&home, "a");
    for directory in ["run", "run/registrations", "log"] {
        assert_eq!(home.mode(directory), 0o700, "{directory}");
    }
    for file in ["run/hostd.sock", "run/registrations/a.json"] {
        assert_eq!(home.mode(file), 0o600, "{file}");
    }
    assert_eq!(home.mode("log/hostd.log") & 0o077, 0, "the log is for its owner");
}

/// Runs `work` as a user without files here. Credentials belong to a thread, so only one thread changes.
fn as_other_user_here<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let nobody = scope.spawn(|| {
            let id = 65_534;
            set_thread_groups(&[]).ok()?;
            let group = Gid::from_raw(id);
            set_thread_res_gid(group, group, group).ok()?;
            let user = Uid::from_raw(id);
            set_thread_res_uid(user, user, user).ok()?;
            Some(work())
        });
        nobody.join().unwrap()
    })
}

fn another_user() {
    let home = Home::new();
    let _daemon = home.daemon();
    register(&home, "a");
    // The temporary directory above it is closed to other users as well; it is opened first.
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(home.path().parent().unwrap(), 0o755);
    open(&home.path(), 0o755);
    let Some(refusal) = as_other_user_here(|| UnixStream::connect(home.socket()).map(drop)) else {
        note!("this process cannot change its user");
        return;
    };
    assert_eq!(refusal.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    assert!(as_other_user_here(|| std::fs::read(home.registration("a"))).unwrap().is_err());
    // With open modes, the daemon checks the user of the peer.
    open(&home.path().join("run"), 0o777);
    open(&home.socket(), 0o777);
    let received = as_other_user_here(|| {
        let mut wire = Wire::connect(&home);
        let _ = wire.try_send(LIST);
        wire.rest()
    });
    assert!(!received.as_ref().unwrap().contains("\"ok\":true"), "another user was answered: {received:?}");
    assert_eq!(exchange(&home, LIST)["ok"], true);
}

fn version_and_http_info() {
    let home = Home::new();
    let daemon = home.daemon();
    let version = done(&home, &json!({"kind": "version"}));
    let text = version["version"].as_str().unwrap();
    assert!(text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()), "{version}");
    assert_eq!(version.as_object().unwrap().len(), 1);
    assert_eq!(ask(&home, &json!({"kind": "http-info"})), json!({"ok": true, "result": {"port": 8974}}));
    daemon.shut_down();
    // Reports the version that was given to it.
    let daemon = home.start().variable("LANDFALL_VERSION", "unversioned").wait_until_ready();
    assert_eq!(done(&home, &json!({"kind": "version"})), json!({"version": "unversioned"}));
    daemon.shut_down();
    let _daemon = home.start().variable("LANDFALL_VERSION", "deadbeef").wait_until_ready();
    assert_eq!(done(&home, &json!({"kind": "version"})), json!({"version": "deadbeef"}));
}

fn shutdown() {
    let home = Home::new();
    let daemon = home.daemon();
    register(&home, "a");
    let port = http_port(&home);
    // A client that reads its answer late: the daemon stops after the answer, and the answer arrives completely.
    let mut late = Wire::connect(&home);
    late.send("{\"kind\":\"shutdown\"}\n");
    assert!(daemon.end().success());
    assert_eq!(late.answer(), json!({"ok": true, "result": {"scheduled": true}}));
    assert!(!home.socket().exists(), "the socket file is left");
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err(), "the HTTP port is left");
    assert!(home.registration("a").exists(), "registrations stay for the next daemon");
    home.wait_for_event("daemon-stopping", |_| true);
}

fn two_shutdowns() {
    let home = Home::new();
    let daemon = home.daemon();
    let (mut first, mut second) = (Wire::connect(&home), Wire::connect(&home));
    // Both lines have arrived before either is answered.
    first.send("{\"kind\":\"shutdown\"}");
    second.send("{\"kind\":\"shutdown\"}");
    first.send("\n");
    // The daemon may have stopped before it reads this one.
    let _ = second.try_send("\n");
    let scheduled = json!({"ok": true, "result": {"scheduled": true}});
    assert_eq!(first.answer(), scheduled);
    let other = second.rest();
    assert!(other.is_empty() || serde_json::from_str::<Value>(&other).unwrap() == scheduled, "{other:?}");
    assert!(daemon.end().success());
    let reported = |kind: &str| home.events().iter().filter(|event| event["kind"] == kind).count();
    assert_eq!((reported("shutdown-requested"), reported("daemon-stopping")), (1, 1));
}

fn events_arrive() {
    let home = Home::new();
    let _daemon = home.daemon();
    let mut all = Wire::connect(&home);
    all.send("{\"kind\":\"events\"}\n");
    assert_eq!(all.line(), "{\"ok\":true}");
    let mut one = Wire::connect(&home);
    one.send("{\"kind\":\"events\",\"containerName\":\"b\"}\n");
    assert_eq!(one.line(), "{\"ok\":true}");
    register(&home, "a");
    register(&home, "b");
    let next = |wire: &mut Wire| loop {
        let event: Value = serde_json::from_str(&wire.line()).unwrap();
        if event["kind"] == "register" {
            return event["containerName"].as_str().unwrap().to_owned();
        }
    };
    assert_eq!((next(&mut all), next(&mut all)), ("a".to_owned(), "b".to_owned()));
    assert_eq!(next(&mut one), "b");
    drop((all, one));
    assert_eq!(exchange(&home, LIST)["ok"], true);
}
