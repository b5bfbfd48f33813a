use super::*;

/// Returns every state that a container and a port can have.
fn containers() -> Vec<DescribedContainer> {
    let value = json!([
        { "containerName": "shop", "cwd": "/w/shop", "way": "process 42", "state": "reached", "forwards": [
            { "port": 3000, "hostPort": 3000, "state": "open", "process": "node", "pid": 77, "connections": 2,
              "label": "W\u{1b}eb", "silent": true,
              "accepted": 9, "bytesUp": 1000, "bytesDown": 1_500_000 },
            { "port": 5432, "hostPort": 5432, "state": "failed", "reason": "EADDRINUSE: coder has it",
              "process": "no\u{1b}]0;de", "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0 },
            { "port": 22, "hostPort": 22, "state": "denied", "reason": "it is below 1024 and not named",
              "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0 },
        ] },
        { "containerName": "coder", "cwd": "/w/coder", "way": "docker", "state": "waiting", "forwards": [] },
        { "containerName": "db", "cwd": "/w/db", "way": "docker", "state": "unreachable",
          "reason": "not permitted to enter it", "forwards": [] },
        { "containerName": "fast", "cwd": "/w/fast", "way": "process 43", "state": "reached", "forwards": [
            { "port": 5173, "hostPort": 5173, "state": "open", "path": "native", "addresses": ["::"],
              "process": "node", "pid": 78, "connections": 1, "accepted": 1, "bytesUp": 10, "bytesDown": 20 },
            { "port": 5174, "hostPort": 5174, "state": "open", "path": "native", "addresses": ["127.0.0.2"],
              "process": "node", "pid": 78, "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0 },
        ] },
        { "containerName": "old", "cwd": "/w/old", "state": "off", "forwards": [] },
    ]);
    serde_json::from_value(value).unwrap()
}

#[test]
fn each_container_and_each_port_has_a_row() {
    insta::assert_snapshot!(registered_table(&containers()));
}

#[test]
fn an_empty_last_column_is_omitted() {
    let mut containers = containers();
    containers.truncate(2);
    containers[0].state.forwards.truncate(1);
    insta::assert_snapshot!(registered_table(&containers));
}

#[test]
fn ports_that_are_not_listed_are_counted_in_a_row() {
    let mut containers = containers();
    containers[0].state.omitted = 1_991;
    let listing = registered_table(&containers[..1]);
    let last = listing.lines().last().unwrap();
    assert!(last.contains("omitted") && last.contains("+1991"), "{listing}");
    assert!(forwards(&containers[0].state).contains("+1991"));
    containers[0].state.omitted = 0;
    assert!(!forwards(&containers[0].state).contains("omitted"));
}

#[test]
fn a_process_cannot_write_to_the_terminal_by_its_name() {
    assert!(!registered_table(&containers()).replace('\n', "").contains(char::is_control));
}

#[test]
fn a_slower_attach_method_has_a_reason_and_a_published_port_its_host_address() {
    let value = json!([{
        "containerName": "shop", "cwd": "/w/shop", "way": "docker, agent in /d", "state": "reached",
        "reason": "not by its namespace: it belongs to another user", "forwards": [
            { "port": 80, "hostPort": 8080, "state": "published", "reason": "Docker publishes it",
              "connections": 0, "accepted": 0, "bytesUp": 0, "bytesDown": 0 },
        ],
    }]);
    let listing = registered_table(&serde_json::from_value::<Vec<DescribedContainer>>(value).unwrap());
    let rows: Vec<&str> = listing.lines().collect();
    assert!(
        rows[1].contains("reached") && rows[1].contains("docker, agent in /d, not by its namespace"),
        "{listing}"
    );
    assert!(rows[2].contains("published") && rows[2].contains("localhost:8080"), "{listing}");
}
