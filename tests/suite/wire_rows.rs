//! One daemon, one client that implements only the wire protocol, and every row of its A.1 and A.2 in order.

use std::time::Duration;

use landfall_tests::case::Case;
use landfall_tests::http::{ask_text, post};
use landfall_tests::rpc::{Wire, exchange};
use landfall_tests::{FakeDocker, Home};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[Case::once("every_row_of_the_wire_specification_in_order", wire_rows)];

/// Requests and their complete answers, in order; `FOLDER` stands for the container's folder.
const SOCKET: &[(&str, &str)] = &[
    // A.1.1 and A.1.2
    ("{\"kind\":\"list\"}\n", "{\"ok\":true,\"result\":{\"registrations\":[]}}\n"),
    ("{\"kind\":\"list\"}\n{\"kind\":\"version\"}\n", "{\"ok\":true,\"result\":{\"registrations\":[]}}\n"),
    ("\n", "{\"ok\":false,\"reason\":\"invalid request json\"}\n"),
    ("list\n", "{\"ok\":false,\"reason\":\"invalid request json\"}\n"),
    ("[]\n", "{\"ok\":false,\"reason\":\"invalid request\"}\n"),
    ("null\n", "{\"ok\":false,\"reason\":\"invalid request\"}\n"),
    ("{\"kind\":\"what\"}\n", "{\"ok\":false,\"reason\":\"unknown request kind\"}\n"),
    ("GIANT", "{\"ok\":false,\"reason\":\"request exceeds buffer limit\"}\n"),
    // A.1.4 in its order
    (
        "{\"kind\":\"register\",\"containerName\":\"walker\",\"cwd\":\"FOLDER\",\"restartToken\":\"t\",\"wsHostPort\":4000,\"portForward\":{\"allow\":[]},\"brokerToken\":\"b\"}\n",
        "{\"ok\":true}\n",
    ),
    (
        "{\"kind\":\"register\",\"containerName\":\"../x\",\"cwd\":\"/\"}\n",
        "{\"ok\":false,\"reason\":\"failed to persist registration: invalid container name for registration file: \\\"../x\\\"\"}\n",
    ),
    (
        "{\"kind\":\"register\",\"containerName\":\"x\"}\n",
        "{\"ok\":false,\"reason\":\"invalid register: cwd\"}\n",
    ),
    (
        "{\"kind\":\"register\",\"containerName\":\"x\",\"cwd\":\"/\",\"wsHostPort\":65536}\n",
        "{\"ok\":false,\"reason\":\"invalid register: wsHostPort\"}\n",
    ),
    (
        "{\"kind\":\"list\"}\n",
        "{\"ok\":true,\"result\":{\"registrations\":[{\"containerName\":\"walker\",\"cwd\":\"FOLDER\"}]}}\n",
    ),
    (
        "{\"kind\":\"status\",\"containerName\":\"walker\"}\n",
        "{\"ok\":true,\"result\":{\"containerName\":\"walker\",\"cwd\":\"FOLDER\",\"forwardedPorts\":[]}}\n",
    ),
    ("{\"kind\":\"status\",\"containerName\":\"x\"}\n", "{\"ok\":false,\"reason\":\"not registered: x\"}\n"),
    (
        "{\"kind\":\"restart\",\"containerName\":\"walker\",\"build\":\"no\"}\n",
        "{\"ok\":false,\"reason\":\"restart.build must be a boolean if provided\"}\n",
    ),
    ("{\"kind\":\"restart\",\"containerName\":\"x\"}\n", "{\"ok\":false,\"reason\":\"not registered: x\"}\n"),
    (
        "{\"kind\":\"restart\",\"containerName\":\"walker\"}\n",
        "{\"ok\":true,\"result\":{\"containerName\":\"walker\",\"scheduled\":true}}\n",
    ),
    (
        "{\"kind\":\"secrets-patch\",\"containerName\":\"x\",\"patch\":{\"mcp\":{\"server\":\"s\",\"credential\":{}}}}\n",
        "{\"ok\":false,\"reason\":\"not registered: x\"}\n",
    ),
    (
        "{\"kind\":\"secrets-patch\",\"containerName\":\"walker\"}\n",
        "{\"ok\":false,\"reason\":\"invalid secrets-patch\"}\n",
    ),
    (
        "{\"kind\":\"secrets-patch\",\"containerName\":\"walker\",\"patch\":{\"mcp\":{\"credential\":{}}}}\n",
        "{\"ok\":false,\"reason\":\"mcp.server is required\"}\n",
    ),
    (
        "{\"kind\":\"secrets-patch\",\"containerName\":\"walker\",\"patch\":{\"mcp\":{\"server\":\"s\",\"credential\":{\"client\":{}}}}}\n",
        "{\"ok\":true,\"result\":{\"containerName\":\"walker\",\"patched\":true}}\n",
    ),
    ("{\"kind\":\"http-info\"}\n", "{\"ok\":true,\"result\":{\"port\":8974}}\n"),
    ("{\"kind\":\"version\"}\n", "{\"ok\":true,\"result\":{\"version\":\"unversioned\"}}\n"),
    ("{\"kind\":\"deregister\",\"containerName\":\"x\"}\n", "{\"ok\":true}\n"),
    ("{\"kind\":\"deregister\"}\n", "{\"ok\":true}\n"),
];

/// The request line and the authorization of a request, its body, and the answer.
const HTTP: &[(&str, &str, &str, u16, &str)] = &[
    ("GET /rpc", "Bearer t", "", 404, "not found"),
    ("POST /", "Bearer t", "", 404, "not found"),
    ("POST /rpc", "", "", 401, "missing bearer token"),
    ("POST /rpc", "Basic t", "", 401, "missing bearer token"),
    ("POST /rpc", "Bearer x", "GIANT", 413, "request exceeds buffer limit"),
    ("POST /rpc", "Bearer x", "{", 400, "invalid request json"),
    (
        "POST /rpc",
        "Bearer x",
        "{\"kind\":\"list\"}",
        403,
        "http transport only supports restart and secrets-patch",
    ),
    (
        "POST /rpc",
        "Bearer x",
        "{\"kind\":\"restart\",\"containerName\":\"walker\"}",
        403,
        "invalid restart token",
    ),
    (
        "POST /rpc",
        "Bearer t",
        "{\"kind\":\"restart\",\"containerName\":\"other\"}",
        403,
        "invalid restart token",
    ),
    (
        "POST /rpc",
        "Bearer t",
        "{\"kind\":\"restart\",\"containerName\":\"walker\",\"build\":1}",
        200,
        "restart.build must be a boolean if provided",
    ),
    (
        "POST /rpc?x",
        "Bearer t",
        "{\"kind\":\"secrets-patch\",\"containerName\":\"walker\",\"patch\":{}}",
        200,
        "invalid secrets-patch",
    ),
];

fn wire_rows() {
    let home = Home::new();
    let docker = FakeDocker::start(&home, &["walker"]);
    let daemon = home.start().variable("LANDFALL_VERSION", "unversioned").wait_until_ready();
    let folder = home.folder("walker").to_str().unwrap().to_owned();
    for (request, wanted) in SOCKET {
        let request =
            if *request == "GIANT" { "x".repeat(65_537) } else { request.replace("FOLDER", &folder) };
        let shown = &request[..request.len().min(200)];
        let mut wire = Wire::connect(&home);
        wire.send(&request);
        let answer: String = wire.rest();
        // The order of fields is not specified; the framing is.
        assert!(answer.ends_with('\n') && answer.matches('\n').count() == 1, "{shown}: {answer:?}");
        let (answer, wanted): (Value, Value) = (
            serde_json::from_str(&answer).unwrap(),
            serde_json::from_str(&wanted.replace("FOLDER", &folder)).unwrap(),
        );
        assert_eq!(answer, wanted, "{shown}");
    }
    let port = 8974;
    for (line, authorization, body, status, reason) in HTTP {
        let body = if *body == "GIANT" { "x".repeat(65_537) } else { (*body).to_owned() };
        let text = post(port, Some("TOKEN"), &body).replacen("POST /rpc", line, 1);
        let text = match *authorization {
            "" => text.replacen("authorization: Bearer TOKEN\r\n", "", 1),
            value => text.replacen("Bearer TOKEN", value, 1),
        };
        let answer = ask_text(port, text);
        assert_eq!((answer.status, answer.reason()), (*status, *reason), "{line} {authorization}");
    }
    let answer = ask_text(port, post(port, Some("t"), "{\"kind\":\"restart\",\"containerName\":\"walker\"}"));
    assert_eq!((answer.status, answer.body["result"]["scheduled"].clone()), (200, json!(true)));
    docker.wait_for_calls("POST /containers/walker/start", 2);
    // Last: a client that does not end its line, and the shutdown.
    let mut waiting = Wire::connect(&home);
    waiting.send("{");
    assert!(waiting.is_silent_for(Duration::from_millis(50)));
    let scheduled = json!({"ok": true, "result": {"scheduled": true}});
    assert_eq!(exchange(&home, "{\"kind\":\"shutdown\"}\n"), scheduled);
    assert!(daemon.end().success());
    assert!(!waiting.rest().contains("\"ok\":true"));
}
