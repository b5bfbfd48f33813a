//! Containers whose servers answer on the host.

use landfall_tests::Home;
use landfall_tests::case::Case;

use super::engine::{Engine, answers, forward, is_open, is_refused, page, refuses, until, up};

pub(crate) const CASES: &[Case] = &[
    Case::once("of_containers_with_one_port_the_next_follows_when_the_first_ends", same_port),
    Case::once("twenty_containers_at_once", twenty),
];

fn same_port() {
    let home = Home::new();
    let engine = Engine::start(&home, &["base"]);
    up(&home, &[]);
    for name in ["first", "second", "third"] {
        engine.serve(name, 3000, &[]);
        forward(&home, name);
        // Whoever comes first has it, so they come one after another.
        until("it to be seen", || match super::engine::container(&home, name) {
            found if found["forwards"][0]["port"] == 3000 => Ok(()),
            found => Err(found),
        });
        answers(3000, "first");
    }
    let told = super::engine::container(&home, "second")["forwards"][0].clone();
    assert_eq!(told["state"], "failed", "{told}");
    assert!(told["reason"].as_str().unwrap().contains("first"), "who has it: {told}");
    engine.docker(&["rm", "-f", "first"]);
    answers(3000, "second");
    // One that only pauses its server has let it go, too.
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
    // All at once, as a compose file has it.
    std::thread::scope(|scope| {
        for (number, name) in (0..).zip(&names) {
            let (home, engine) = (&home, &engine);
            scope.spawn(move || {
                engine.serve(name, port(number), &[]);
                forward(home, name);
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
