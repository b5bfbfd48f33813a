//! Tests of the real binary: help, errors and hints in this file, behaviour in the modules.

#[path = "cli/agent.rs"]
mod agent;
#[path = "cli/asking.rs"]
mod asking;
#[path = "cli/daemon.rs"]
mod daemon;
#[path = "cli/forward.rs"]
mod forward;
#[path = "cli/grants.rs"]
mod grants;
#[path = "support/ports.rs"]
mod ports;
#[path = "cli/registered.rs"]
mod registered;
#[path = "cli/run.rs"]
mod run;
#[path = "cli/support.rs"]
mod support;

use std::process::Output;

use support::{Nobody, output, stderr, stdout};

/// Returns everything that the program printed, with the exit code.
fn seen(output: &Output) -> String {
    let code = output.status.code().unwrap_or(-1);
    format!("{}{}exit {code}", stdout(output), stderr(output))
}

fn landfall(arguments: &[&str]) -> String {
    seen(&output(arguments))
}

#[test]
fn help_lists_the_verbs_and_the_exit_codes() {
    insta::assert_snapshot!("help", landfall(&["--help"]));
    insta::assert_snapshot!("help_run", landfall(&["run", "--help"]));
    insta::assert_snapshot!("help_attach", landfall(&["attach", "--help"]));
    insta::assert_snapshot!("help_doctor", landfall(&["doctor", "--help"]));
    insta::assert_snapshot!("help_agent", landfall(&["agent", "--help"]));
    insta::assert_snapshot!("help_agent_forward", landfall(&["agent", "forward", "--help"]));
    for verb in [
        "up",
        "down",
        "status",
        "ls",
        "register",
        "deregister",
        "grant",
        "revoke",
        "detach",
        "restart",
        "trust",
        "events",
        "logs",
        "version",
    ] {
        insta::assert_snapshot!(format!("help_{verb}"), landfall(&[verb, "--help"]));
    }
}

#[test]
fn no_arguments_print_help_and_are_a_usage_error() {
    let output = output(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage: landfall"));
}

#[test]
fn an_invalid_command_line_is_one_line_and_a_hint() {
    let all = [
        &["run"][..],
        &["run", "npm", "run", "dev"],
        &["run", "--allow", "9-8", "--", "true"],
        &["run", "--allow", "http", "--", "true"],
        &["run", "--deny", "3000,,1", "--", "true"],
        &["run", "--deny", "0", "--", "true"],
        &["run", "--name", "a b", "--", "true"],
        &["run", "--net", "tor", "--", "true"],
        &["run", "--jsno", "--", "true"],
        &["attach"],
        &["attach", "--pid", "1", "--netns", "x"],
        &["attach", "--pid", "0"],
        &["attach", "--pid", "x"],
        &["atach"],
        &["doctor", "--fix"],
        &["trust", "--show", "--yes"],
        &["trust", "--list", "x"],
        &["agent", "--interval", "soon"],
        &["agent", "--bind", "everywhere"],
        &["agent", "forward"],
        &["agent", "forward", "0"],
        &["agent", "forward", "80", "--host", "9-8"],
        &["agent", "forward", "80", "--wait", "long"],
    ];
    let seen: Vec<String> = all
        .iter()
        .map(|arguments| format!("$ landfall {}\n{}\n", arguments.join(" "), landfall(arguments)))
        .collect();
    insta::assert_snapshot!("usage_errors", seen.join("\n"));
}

#[test]
fn a_command_that_cannot_be_executed_is_126_or_127() {
    insta::assert_snapshot!(landfall(&["run", "--net", "none", "--", "no-such-command"]));
    insta::assert_snapshot!(landfall(&["run", "--net", "none", "--", "/etc/passwd"]));
}

#[test]
fn an_error_is_one_json_object_under_json() {
    let output = output(&["run", "--net", "none", "--json", "--", "no-such-command"]);
    let error: serde_json::Value = serde_json::from_str(stderr(&output).trim()).unwrap();
    assert_eq!(error["event"], "error");
    assert_eq!(error["exit"], 127);
    assert!(error["hint"].is_string());
}

#[test]
fn a_namespace_that_cannot_be_attached_to_is_reported_with_the_reason() {
    // Above the highest process id that Linux gives (PID_MAX_LIMIT, 4194304).
    insta::assert_snapshot!(landfall(&["attach", "--pid", "4194305"]));
    insta::assert_snapshot!(landfall(&["attach", "--netns", "/run/netns/no-such-namespace"]));
    insta::assert_snapshot!(landfall(&["attach", "--netns", "/etc/passwd"]));
    insta::assert_snapshot!(landfall(&["attach", "--netns", "/proc/self/ns/net"]));
    let ours = landfall(&["attach", "--pid", &std::process::id().to_string()]);
    insta::assert_snapshot!(ours.replace(&std::process::id().to_string(), "PID"));
}

#[test]
fn a_namespace_of_another_user_is_refused_with_a_hint() {
    let Some(nobody) = Nobody::new() else { return };
    let output = nobody.landfall().args(["attach", "--pid", "1"]).output().unwrap();
    insta::assert_snapshot!(seen(&output));
}

#[test]
fn doctor_prints_each_finding_and_whether_forwarding_works() {
    let text = output(&["doctor"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&output(&["doctor", "--json"]))).unwrap();
    assert_eq!(text.status.code(), Some(if json["works"] == true { 0 } else { 1 }));
    for finding in json["findings"].as_array().unwrap() {
        assert!(stdout(&text).contains(finding["what"].as_str().unwrap()));
        assert_eq!(
            finding["hint"].is_string(),
            finding["state"] != "ok",
            "each finding that is not ok has a hint: {finding}"
        );
    }
}
