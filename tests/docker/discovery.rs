//! Discovery of containers whose servers answer on the host.

use landfall_tests::Home;
use landfall_tests::case::Case;

use serde_json::Value;

use super::engine::{
    Engine, LABEL, answers, container, images_directory, is_open, is_refused, landfall, page, refuses, until,
    up,
};

pub(crate) const CASES: &[Case] = &[
    Case::once("containers_are_forwarded_by_label_by_name_or_all", found),
    Case::once("c23_an_image_opens_no_port_by_its_labels", hostile_image),
    Case::once("a_port_passes_to_the_next_container_when_its_owner_ends", same_port),
    Case::once("twenty_containers_started_at_once_are_forwarded", twenty),
];

fn found() {
    let home = Home::new();
    let engine = Engine::start(&home, &["base", "nginx"]);
    engine.serve("before", 3000, &[]);
    engine.serve_with_options("plain", 3001, &[]);
    engine.serve_with_options("never", 3002, &["--label", "dev.landfall.forward=false"]);
    engine.run("static", &["--label", LABEL], "nginx", &["nginx", "-c", "/etc/nginx.conf"]);
    up(&home, &[]);
    answers(3000, "before");
    answers(8080, "from nginx");
    engine.serve("after", 3003, &[]);
    answers(3003, "after");
    for port in [3001, 3002] {
        assert!(is_refused(port), "{port} answers without a request");
    }

    landfall(&home, &["attach", "plain"]);
    answers(3001, "plain");
    landfall(&home, &["detach", "plain"]);
    refuses(3001);
    // `detach` by the user overrides the label.
    landfall(&home, &["detach", "after"]);
    refuses(3003);
    engine.docker(&["restart", "-t", "0", "after"]);

    landfall(&home, &["down"]);
    refuses(3000);
    up(&home, &["--all"]);
    answers(3000, "before");
    answers(3001, "plain");
    answers(8080, "from nginx");
    for port in [3002, 3003] {
        assert!(is_refused(port), "{port} answers, and that was forbidden");
    }
    landfall(&home, &["attach", "after"]);
    answers(3003, "after");
}

/// A public image whose author chose which ports it opens on the host of its users.
fn hostile_image() {
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    let labels = [
        "LABEL dev.landfall.forward=true dev.landfall.name=postgres dev.landfall.allow=80,5432",
        r#"LABEL devcontainer.metadata='[{"forwardPorts":[80]}]'"#,
    ];
    let from = images_directory().join("base.tar");
    engine.docker(&[
        "import",
        "--change",
        labels[0],
        "--change",
        labels[1],
        from.to_str().unwrap(),
        "hostile",
    ]);
    let script = "mkdir -p /www; echo hostile >/www/index.html; \
        busybox httpd -p 127.0.0.1:80 -h /www; exec busybox httpd -f -p 127.0.0.1:5432 -h /www";
    engine.run("db", &[], "hostile", &["sh", "-c", script]);
    up(&home, &[]);
    // Created after it, so it is not discovered earlier.
    engine.serve("own", 3000, &[]);
    answers(3000, "own");
    let why = |name: &str| {
        let found: Value = serde_json::from_str(&landfall(&home, &["ls", "--all", "--json"])).unwrap();
        let found = found["containers"].as_array().unwrap().clone();
        found.into_iter().find(|one| one["name"] == name).unwrap()["why"].clone()
    };
    assert_eq!(why("db"), "label comes from the image");
    for port in [80, 5432] {
        assert!(is_refused(port), "{port} answers, and only the image asked for it");
    }
    landfall(&home, &["attach", "db"]);
    answers(5432, "hostile");
    assert!(is_refused(80), "a port below 1024 that is not named is forwarded");
    // Without its image, it is unknown which labels the container was given itself.
    engine.docker(&["stop", "-t", "0", "own", "db"]);
    engine.docker(&["rmi", "-f", "base"]);
    landfall(&home, &["down"]);
    up(&home, &[]);
    until("own to be listed", || match why("own") {
        why if why == "label may come from the image, which cannot be inspected" => Ok(()),
        why => Err(why),
    });
}

fn same_port() {
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    for name in ["first", "second", "third"] {
        engine.serve(name, 3000, &[]);
        // The first container gets the port, so they are started one after another.
        until("it to be seen", || match container(&home, name) {
            found if found["forwards"][0]["port"] == 3000 => Ok(()),
            found => Err(found),
        });
        answers(3000, "first");
    }
    let reported = container(&home, "second")["forwards"][0].clone();
    assert_eq!(reported["state"], "failed", "{reported}");
    assert!(
        reported["reason"].as_str().unwrap().contains("first"),
        "the reason does not name the owner: {reported}"
    );
    engine.docker(&["rm", "-f", "first"]);
    answers(3000, "second");
    // A container that stops only its server frees the port, too.
    engine.docker(&["kill", "second"]);
    answers(3000, "third");
    engine.docker(&["start", "second"]);
    for turn in 0..50 {
        assert_eq!(page(3000, turn).unwrap(), "third");
    }
    engine.docker(&["rm", "-f", "third"]);
    answers(3000, "second");
}

fn twenty() {
    const COUNT: u16 = 20;
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    let names: Vec<_> = (0..COUNT).map(|number| format!("c{number:02}")).collect();
    let port = |number: u16| 4000 + number;
    // All at once, as a compose file does it.
    std::thread::scope(|scope| {
        for (number, name) in (0..).zip(&names) {
            let engine = &engine;
            scope.spawn(move || {
                engine.serve(name, port(number), &[]);
            });
        }
    });
    for (number, name) in (0..).zip(&names) {
        answers(port(number), name);
        is_open(&home, name, &[port(number)]);
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    engine.docker(&[&["rm", "-f"], &all[..]].concat());
    (0..COUNT).for_each(|number| refuses(port(number)));
    assert!(is_refused(port(0)));
}
